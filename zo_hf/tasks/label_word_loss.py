"""Cross entropy among the label words alone, MeZO's "train as classification".

The loss over the whole vocabulary is dominated, for a model that has not seen the prompt, by words that are no label at
all; its gradient, and with it the noise of a zeroth-order estimate, then says little about which label is right.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput


class LabelWordLoss:
    """A `compute_loss_func` for batches of `LabelWordCollator`.

    Args:
        label_ids: the token that stands for label 0, 1, ...
    """

    def __init__(self, label_ids: Sequence[int]) -> None:
        self.label_ids = torch.tensor(label_ids)

    def __call__(self, outputs: ModelOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The mean over the batch, or the sum divided by `num_items_in_batch`.

        Args:
            outputs: with `logits` of shape (batch, positions, vocabulary); the last position is the label token itself,
                so the one before it predicts it.
            labels: (batch, positions), the label token at the last one.
        """
        label_ids = self.label_ids.to(labels.device)
        answers = (labels[:, -1:] == label_ids).int().argmax(dim=1)
        scores = outputs["logits"][:, -2, label_ids.to(outputs["logits"].device)].float()
        losses = torch.nn.functional.cross_entropy(scores, answers.to(scores.device), reduction="none")
        return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch
