"""One forward pass for all probes of a step, for a loss of TRL.

TRL computes the loss of each probe by its own code, from that probe's part of the outputs:

    inputs (rows, ...) -> copies (probes · rows, ...) -> outputs (probes · rows, ...) -> parts (rows, ...) -> a loss each
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zo_hf.estimators.probe import NotBatchable
from zo_hf.evaluation.model_loss import repeated
from zo_hf.evaluation.row_losses import LossByRows
from zo_hf.trl.token_outputs import TokenOutputs, token_outputs


class LossAtProbes(LossByRows):
    """The loss of a batch, which can also be evaluated at several probes in one forward pass.

    Args:
        sharing: enters a context in which the loss takes its outputs from a `SharedForward`.
        by_rows: evaluates the loss as `RowLosses`.
        rows: rows of the batch.
        whole: evaluates the loss as one number.
        model_rows: rows of the model's inputs.
    """

    def __init__(
        self,
        sharing: Callable[[SharedForward], AbstractContextManager[None]],
        by_rows: Callable[[], Any],
        rows: int,
        whole: Callable[[], Any],
        model_rows: int,
    ) -> None:
        super().__init__(by_rows, rows, whole, model_rows)
        self._sharing = sharing

    def batched(self, copies: int) -> Tensor:
        """Return the losses at `copies` probes, (copies,), from one forward pass over as many copies of the batch.

        Raises:
            NotBatchable: the batch cannot be repeated, or the loss needs other outputs than those of its copy.
        """
        shared, losses = SharedForward(copies, self.model_rows), []
        with self._sharing(shared):
            for shared.copy in range(copies):
                losses.append(self().reshape(()))
        return torch.stack(losses)


class SharedForward:
    """Computes the outputs at all probes of a step when the first of them needs them.

    Args:
        copies: the number of probes.
        rows: rows of the model's inputs.

    Attributes:
        copy: the number of the probe of which the loss is computed.
    """

    def __init__(self, copies: int, rows: int) -> None:
        self._copies, self._rows = copies, rows
        self._seen: list[tuple[dict[str, Any], list[Any]]] = []
        self.copy = 0

    def of(self, model: nn.Module, unwrapped: PreTrainedModel) -> ModelOfOneProbe:
        """Return a model as TRL's losses call it, which returns the outputs at the present probe.

        Args:
            model: the module to call.
            unwrapped: the transformers model inside.
        """
        return ModelOfOneProbe(self, model, unwrapped)

    def outputs(self, model: nn.Module, unwrapped: PreTrainedModel, is_fused: bool, inputs: dict[str, Any]) -> Any:
        """Return the model's output at the present probe, with its logits alone, or `TokenOutputs` if `is_fused`.

        Raises:
            NotBatchable: the batch cannot be repeated, or the output has terms of all rows together.
        """
        if inputs.get("output_router_logits"):
            raise NotBatchable("the loss of the router is one of all rows together")
        key = inputs | {"fused_lm_head": is_fused}
        found = next((parts for seen, parts in self._seen if _are_same(seen, key)), None)
        if found is None:
            if self.copy:
                raise NotBatchable("the loss calls the model differently at every probe")
            copies = repeated(inputs, self._rows, self._copies)
            found = self._parts(token_outputs(model, unwrapped, copies) if is_fused else model(**copies))
            self._seen.append((key, found))
        return found[self.copy]

    def _parts(self, outputs: Any) -> list[Any]:
        if isinstance(outputs, TokenOutputs):
            values = [value.chunk(self._copies) for value in vars(outputs).values()]
            return [TokenOutputs(*part) for part in zip(*values, strict=True)]
        return [type(outputs)(logits=part) for part in outputs["logits"].chunk(self._copies)]


class ModelOfOneProbe:
    """A model as TRL's losses call it, with outputs of a `SharedForward`; the arguments are those of `SharedForward.of`."""

    def __init__(self, shared: SharedForward, model: nn.Module, unwrapped: PreTrainedModel) -> None:
        self._shared, self._model, self._unwrapped = shared, model, unwrapped

    def __call__(self, fused_lm_head: bool = False, **inputs: Any) -> Any:
        """Return the outputs at the present probe; see `SharedForward.outputs`."""
        return self._shared.outputs(self._model, self._unwrapped, fused_lm_head, inputs)

    def __getattr__(self, name: str) -> Any:
        """Return the model's own attribute, such as its config, which the loss of a subclass may read."""
        return getattr(self._model, name)


def _are_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(_is_same(value, other[name]) for name, value in one.items())


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return type(one) is type(other) and one == other
