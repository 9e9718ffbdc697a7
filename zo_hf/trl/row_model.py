"""A model whose outputs know the rows of the batch, for a loss of TRL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zo_hf.estimators.probe import NotBatchable
from zo_hf.evaluation.known_losses import IGNORED
from zo_hf.evaluation.model_loss import only_labeled_logits
from zo_hf.trl.row_tensor import row_tensor

#: Tokens whose probabilities are computed at once. A tile of a large vocabulary takes 0.6 GB.
TILE = 1024


@dataclass(frozen=True)
class TokenOutputs:
    """Outputs for every token, as TRL's losses read them; all are 0 or False where no label is.

    Attributes:
        log_probs: log-probabilities of the labels, (rows, length - 1), float32.
        entropy: entropies of the distributions, of the same shape.
        mean_logits: means of the logits, of the same shape.
        is_top1: whether the label is the most likely token, of the same shape.
        label_mask: whether there is a label, of the same shape.
    """

    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    label_mask: Tensor


class RowModel:
    """A model as TRL's losses call it, with outputs that know the rows of the batch.

    TRL's head multiplies by the weight of the model's head outside of that module. There every row would have the same
    weight, so this computes the log-probabilities from the model's logits, at the labels alone.

    Args:
        model: the module to call.
        unwrapped: the transformers model inside.
        rows: rows or pairs of the batch, or sequences packed into it.
        pairs: True if the batch has all chosen and then all rejected sequences. The model then sees each pair in two
            rows that follow each other, because they share a direction.
        sequence_of: the packed sequence of every position, int64 (1, length); None if rows are not packed.
    """

    def __init__(
        self, model: nn.Module, unwrapped: PreTrainedModel, rows: int, pairs: bool, sequence_of: Tensor | None
    ) -> None:
        self._model, self._unwrapped, self._rows, self._sequence_of = model, unwrapped, rows, sequence_of
        self._order = torch.arange(2 * rows).view(2, rows).T.flatten() if pairs else None

    def __call__(self, fused_lm_head: bool = False, **inputs: Any) -> Any:
        """Return the model's output, or `TokenOutputs` if TRL asks for its own head.

        Raises:
            NotBatchable: the output has terms of all rows together.
        """
        if inputs.get("output_router_logits"):
            raise NotBatchable("the loss of the router is one of all rows together")
        if self._order is not None:
            inputs = {name: self._ordered(value) for name, value in inputs.items()}
        if fused_lm_head:
            return self._token_outputs(inputs)
        outputs = self._model(**inputs)
        if self._sequence_of is None:
            outputs["logits"] = row_tensor(self._back(outputs["logits"]), self._rows)
        return outputs

    def __getattr__(self, name: str) -> Any:
        """Return the model's own attribute, such as its config, which the loss of a subclass may read."""
        return getattr(self._model, name)

    def _token_outputs(self, inputs: dict[str, Any]) -> TokenOutputs:
        labels = inputs["labels"][:, 1:]
        kept = only_labeled_logits(self._unwrapped, inputs)
        positions = kept.get("logits_to_keep")
        kept = {name: value for name, value in kept.items() if name not in ("labels", "shift_labels")}
        logits = self._model(**kept)["logits"]
        mask = labels != IGNORED
        at_labels = mask if positions is None else mask[:, positions]
        logits = logits[:, :-1] if positions is None else logits
        tiles = zip(logits[at_labels].split(TILE), labels[mask].split(TILE), strict=True)
        found = [_of_tokens(*tile) for tile in tiles]
        whole = [self._back(_at(mask, torch.cat(values))) for values in zip(*found, strict=True)] if found else []
        log_probs, entropy, mean_logits, is_top1 = whole or [mask.new_zeros(mask.shape).float()] * 4
        row_of = None if self._sequence_of is None else self._sequence_of[:, :-1]
        log_probs = row_tensor(log_probs, self._rows, row_of)
        return TokenOutputs(log_probs, entropy, mean_logits, is_top1.bool(), self._back(mask))

    def _ordered(self, value: Any) -> Any:
        assert self._order is not None
        carries = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(self._order)
        return value[self._order.to(value.device)] if carries else value

    def _back(self, value: Tensor) -> Tensor:
        """Return a result in the order of TRL's batch."""
        return value if self._order is None else value[self._order.argsort().to(value.device)]


def _of_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the values of `TokenOutputs`, (tokens,) each, from logits (tokens, vocabulary) and labels (tokens,)."""
    logits = logits.float()
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(1, labels[:, None])[:, 0], entropy, logits.mean(-1), logits.argmax(-1) == labels


def _at(mask: Tensor, values: Tensor) -> Tensor:
    """Return values, (tokens,), at the places where the mask is True, in the shape of the mask, and 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
