"""A transformers model's own loss: logits only where a label needs them, and several probes in one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import (
    LOSS_MAPPING,
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)

from zo_hf.probes.probe import NotBatchable

IGNORED = -100

# Classes whose name does not tell transformers which loss is theirs, so that it falls back to the causal one.
_CAUSAL_BY_DEFAULT = ("GPT2LMHeadModel", "BertLMHeadModel")


class ModelLoss:
    """The loss of one batch, callable for one probe, or `batched` for several at once.

    Args:
        forward: runs the model, e.g. the model itself or accelerate's wrapper of it.
        model: the transformers model inside, whose class says what its loss is.
        inputs: the batch, with `labels`.
        sequential: the loss as the caller computes it for one probe; the batched one must agree with it.
        num_items_in_batch: what the loss is divided by instead of this batch's own count, see Trainer.
        factor: multiplies the batched loss (what `sequential` does beyond the model's own loss).
        in_front: how many more positions the logits have than the input, before its own.
    """

    def __init__(
        self,
        forward: Callable,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        sequential: Callable[[dict[str, Any]], Tensor],
        num_items_in_batch: Tensor | int | None = None,
        factor: float = 1.0,
        in_front: int = 0,
    ) -> None:
        self._forward, self._model, self._sequential, self._factor = forward, model, sequential, factor
        self._num_items, self._in_front = num_items_in_batch, in_front
        self._inputs = only_labelled_logits(model, inputs, in_front)
        self.rows = len(inputs["labels"])

    def __call__(self) -> Tensor:
        """The loss at the current point, a scalar."""
        return self._sequential(dict(self._inputs))

    def batched(self, copies: int) -> Tensor:
        """The losses of `copies` probes, (copies,), from one forward pass over the batch repeated that many times."""
        if self._in_front:
            raise NotBatchable("PEFT makes one prompt for all rows of a batch")
        inputs = {k: v for k, v in self._inputs.items() if k not in ("labels", "shift_labels")}
        logits = self._forward(**{k: self._repeat(v, copies) for k, v in inputs.items()})["logits"]
        return torch.stack([self._loss(part) for part in logits.chunk(copies)]) * self._factor

    def _repeat(self, value: Any, copies: int) -> Any:
        carries_batch = isinstance(value, Tensor) and value.ndim > 0 and len(value) == self.rows
        # A list of logit positions may have as many entries as the batch has rows; it is the same for all rows.
        if not carries_batch or value is self._inputs.get("logits_to_keep"):
            return value
        return value.repeat(copies, *([1] * (value.ndim - 1)))

    def _loss(self, logits: Tensor) -> Tensor:
        """logits: the model's output for one probe, (rows, ...)."""
        labels, config = self._inputs["labels"].to(logits.device), self._model.config
        kind = loss_kind(self._model)
        assert kind is not None, "the caller asks loss_kind first"
        if kind is ForSequenceClassificationLoss:
            return ForSequenceClassificationLoss(labels, logits, config)
        if kind is ForTokenClassification:
            return ForTokenClassification(logits, labels, config)
        return kind(
            logits,
            labels,
            vocab_size=logits.shape[-1],
            num_items_in_batch=self._num_items,
            shift_labels=self._inputs.get("shift_labels"),
        )


def loss_kind(model: PreTrainedModel) -> Callable | None:
    """The function behind the model's own loss, or None where this module does not know how to compute it in parts."""
    if model.config.is_encoder_decoder:
        return None
    name = model.loss_type
    if name is None and any(base.__name__ in _CAUSAL_BY_DEFAULT for base in type(model).__mro__):
        name = "ForCausalLM"
    kind = LOSS_MAPPING.get(name) if name is not None else None
    known = (ForCausalLMLoss, ForMaskedLMLoss, ForSequenceClassificationLoss, ForTokenClassification)
    return kind if kind in known else None


def _is_on_several_devices(model: nn.Module) -> bool:
    return len({parameter.device for parameter in model.parameters()}) > 1


def only_labelled_logits(model: PreTrainedModel, inputs: Mapping[str, Any], in_front: int = 0) -> dict[str, Any]:
    """The inputs, with which a causal model computes logits only at positions that predict a label.

    The positions are those that any row of the batch needs, so that they are one slice for all rows. Left as they are
    where the model cannot, or where most positions carry a label. `in_front` is as in `ModelLoss`.
    """
    inputs = dict(inputs)
    accepted = inspect.signature(model.forward).parameters
    takes_kwargs = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    if (
        loss_kind(model) is not ForCausalLMLoss
        or "logits_to_keep" not in accepted
        or not takes_kwargs
        or "logits_to_keep" in inputs
        or inputs["labels"].ndim != 2
        or _is_on_several_devices(model)  # the positions would be on another device than what they index
    ):
        return inputs
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]
    positions = (shifted != IGNORED).any(0).nonzero().flatten()
    if 0 < len(positions) <= shifted.shape[1] // 2:
        inputs["logits_to_keep"] = positions + in_front
        inputs["shift_labels"] = shifted[:, positions].contiguous()
    return inputs
