"""Cross entropy among the label words alone, MeZO's "train as classification".

For a model that has not seen the prompt, words that are no labels dominate the loss over the whole vocabulary. Its
gradient, and so a zeroth-order estimate of it, then carries little information about the right label.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput


class LabelWordLoss:
    """A `compute_loss_func` for batches of `LabelWordCollator`.

    Args:
        label_ids: the token of label 0, 1, ...
    """

    def __init__(self, label_ids: Sequence[int]) -> None:
        self.label_ids = torch.tensor(label_ids)

    def __call__(self, outputs: ModelOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the mean loss over the batch, or the sum divided by `num_items_in_batch`.

        Args:
            outputs: model outputs with `logits` of shape (batch, positions, vocabulary), or (batch, positions, labels)
                inside of `label_words_alone`. The last position is the label token itself, and the one before it
                predicts the label.
            labels: (batch, positions), with the label token at the last position.
            num_items_in_batch: divisor in place of the batch size, as in Trainer.
        """
        label_ids = self.label_ids.to(labels.device)
        answers = (labels[:, -1:] == label_ids).int().argmax(dim=1)
        scores = scores_of_labels(outputs["logits"], self.label_ids).float()
        losses = torch.nn.functional.cross_entropy(scores, answers.to(scores.device), reduction="none")
        return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


def scores_of_labels(logits: Tensor, label_ids: Tensor) -> Tensor:
    """Return the logits that predict the label, (batch, labels).

    Args:
        logits: (batch, positions, vocabulary), or (batch, positions, labels); the last position but one predicts.
        label_ids: the token of label 0, 1, ..., int64 (labels,).
    """
    predicting = logits[:, -2]
    return predicting if predicting.shape[1] == len(label_ids) else predicting[:, label_ids.to(logits.device)]
