"""The loss of a transformers model: logits only where a label needs them, and several probes in one forward pass.

Logits of many tokens are computed in chunks, see `zo_hf.evaluation.chunked_head`.

All of this needs the loss to be a known function of the logits. A model may add terms of its own: a mixture of experts the loss
of its router, a subclass whatever its forward computes. `ModelLoss` therefore compares the model's loss with the known
function on the same logits before it relies on it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Container, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from zo_hf.estimators.probe import NotBatchable
from zo_hf.evaluation import chunked_head
from zo_hf.evaluation.chunked_head import ChunkedHead
from zo_hf.evaluation.known_losses import (
    IN_DTYPE_OF_LOGITS,
    divisor_of,
    known_loss,
    loss_kind,
    losses_of_rows,
    means_of_rows,
    shares_of_groups,
    sums_of_groups,
    targets_of,
)
from zo_hf.evaluation.labeled_positions import labeled_positions
from zo_hf.evaluation.output_hooks import may_change_outputs
from zo_hf.evaluation.pass_graphs import NotCapturable
from zo_hf.evaluation.precision import same_but_for_order
from zo_hf.evaluation.row_losses import RowLosses
from zo_hf.offload import computing_devices
from zo_hf.subspaces.functional import HALF, to_float

#: Inputs of padding-free batches: they describe the sequences within a row, so a copy of the row needs other values.
_WITHIN_ROWS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

#: The divisor of the loss among the inputs of a forward pass.
_ITEMS = "num_items_in_batch"


@dataclass
class LossChecks:
    """Results of comparing a run's model with the known function of its logits; shared by the run's `ModelLoss`es.

    Attributes:
        is_known: True if the model's loss is the known function; None before the first comparison.
        layouts: which inputs carry the rows, for every kind of batch that has been evaluated in one forward pass.
        grouped: the same for batches whose loss came apart by rows.
        sums_in_half: True for a model that computes its loss in half precision, where differences are lost.
        in_chunks: True if the losses of tokens may be computed in chunks; None before the first batch that needs it.
    """

    is_known: bool | None = None
    layouts: set[tuple[tuple[str, bool], ...]] = field(default_factory=set)
    grouped: set[tuple[tuple[str, bool], ...]] = field(default_factory=set)
    sums_in_half: bool = False
    in_chunks: bool | None = None


class ModelLoss:
    """The loss of one batch: call it for one probe, or call `batched` for several at once.

    Args:
        forward: the module to call, e.g. the model itself or a wrapper of accelerate or PEFT around it.
        model: the transformers model inside; its class determines its loss.
        inputs: the batch, with `labels`.
        sequential: computes the caller's loss for one probe; the batched loss must agree with it.
        num_items_in_batch: divisor of the loss in place of this batch's own count, as in Trainer.
        factor: multiplies the batched loss, for a `sequential` that scales the model's own loss.
        in_front: number of logit positions that precede those of the input.
        checks: what the run's earlier batches have shown about the model; None begins anew.
        divides: False computes all logits at once, for a head whose perturbation every chunk would draw again.
        labels_on_host: the labels of the batch on the CPU, if they are there as well; then no device is asked for them.

    Attributes:
        inputs: the batch, see above.
        rows: rows of the batch.
    """

    def __init__(
        self,
        forward: nn.Module,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        sequential: Callable[[dict[str, Any]], Tensor],
        num_items_in_batch: Tensor | int | None = None,
        factor: float = 1.0,
        in_front: int = 0,
        checks: LossChecks | None = None,
        divides: bool = True,
        labels_on_host: Tensor | None = None,
    ) -> None:
        self._forward, self._model, self._sequential, self._factor = forward, model, sequential, factor
        self._num_items, self._in_front, self._divides = num_items_in_batch, in_front, divides
        self._checks = LossChecks() if checks is None else checks
        self.inputs, self._inputs = inputs, inputs
        # A forward of the user's own may compute a term from all logits, even one that is 0 in the first batch.
        self._is_stock = _has_stock_forward(model)
        if self._is_stock and self._checks.is_known is not False:
            self._inputs = only_labeled_logits(model, inputs, in_front, labels_on_host)
        self.rows = len(inputs["labels"])

    def __call__(self) -> Tensor:
        """Return the loss at the current point, a scalar."""
        if self._needs_chunks():
            return self._sums_in_chunks(1)[0] * self._factor
        # Behind a prompt, only few logits have the positions of the labels.
        if self._checks.is_known is None and (not self._in_front or "logits_to_keep" in self._inputs):
            return self._first()
        if self._checks.is_known and self._checks.sums_in_half:
            _, _, logits = self._seen()
            return self._loss(logits) * self._factor
        return self._sequential(dict(self._inputs))

    def _first(self) -> Tensor:
        """Evaluate, and compare the model's loss with the known function; if they differ, evaluate with all logits."""
        loss: Tensor | None = None
        try:
            loss, own, logits = self._seen()
            self._checks.is_known = same_but_for_order(own, self._loss(logits))
            self._note_precision(own)
            if self._checks.is_known and self._checks.sums_in_half:
                return self._loss(logits) * self._factor
        except Exception:  # a model that takes logits_to_keep, and then compares their number with all labels
            self._checks.is_known = False
        if loss is not None and (self._checks.is_known or "logits_to_keep" not in self._inputs):
            return loss
        self._inputs = self.inputs
        return self._sequential(dict(self._inputs))

    def _seen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the caller's loss, the model's own loss and its logits, from one forward pass."""
        seen: list[tuple[Tensor, Tensor]] = []

        def look(module: nn.Module, args: Any, output: Any) -> None:
            # A copy, because Trainer multiplies the loss in place.
            seen.append((output["loss"].detach().clone(), output["logits"]))

        handle = self._forward.register_forward_hook(look)
        try:
            loss = self._sequential(dict(self._inputs))
        finally:
            handle.remove()
        return loss, *seen[-1]

    def batched(self, copies: int) -> Tensor:
        """Return the losses of `copies` probes, (copies,), from one forward pass over as many copies of the batch.

        Raises:
            NotBatchable: the batch cannot be repeated, or the model's loss is not the known function of its logits.
        """
        layout = self._separable_layout(self._checks.layouts)
        if self._needs_chunks(copies):
            losses = self._sums_in_chunks(copies, copies)
        else:
            parts = self._logits(copies).chunk(copies)
            losses = torch.stack([self._loss(part) for part in parts])
        self._checks.layouts.add(layout)
        return losses if self._factor == 1 else losses * self._factor

    def by_groups(self, groups: int, group_of: Tensor | None = None) -> Tensor:
        """Return the shares of `groups` groups in the loss, (groups,), from one forward pass.

        Args:
            groups: the number of groups.
            group_of: the group of every position, int64 (rows, length) in ascending order. None makes equal groups of
                consecutive rows.

        Raises:
            NotBatchable: the model's loss does not come apart by rows.
        """
        layout = self._separable_layout(self._checks.grouped)
        if group_of is None and self._needs_chunks():
            shares = self._sums_in_chunks(groups)
            self._checks.grouped.add(layout)
            return shares * self._factor
        logits = self._logits()
        if group_of is not None and self.kept is not None:
            group_of = group_of[:, self.kept]
        shares = self._shares(logits, groups, group_of)
        self._checks.grouped.add(layout)
        return shares * self._factor

    def batched_by_groups(self, groups: int, copies: int) -> Tensor:
        """Return the shares of equal groups of rows in each of `copies` probes, (copies, groups), from one forward pass.

        Args:
            groups: the number of groups in one copy of the batch.
            copies: the number of probes.

        Raises:
            NotBatchable: the batch cannot be repeated, or the model's loss does not come apart by rows.
        """
        layout = self._separable_layout(self._checks.grouped)
        if self._needs_chunks(copies):
            shares = self._sums_in_chunks(copies * groups, copies).view(copies, groups)
        else:
            parts = self._logits(copies).chunk(copies)
            shares = torch.stack([self._shares(part, groups) for part in parts])
        self._checks.grouped.add(layout)
        return shares * self._factor

    def pass_inputs(self) -> tuple[dict[str, Tensor], Hashable]:
        """Return what a forward pass for several probes reads; see `CapturableLoss`.

        Raises:
            NotCapturable: an input is neither a tensor nor a plain value.
        """
        given = {**self._inputs, _ITEMS: self._num_items}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in given.items() if name not in tensors}
        for name, value in others.items():
            if not isinstance(value, bool | int | float | str | None):
                raise NotCapturable(
                    f"zo_cuda_graph=True takes tensors and plain values as inputs of the model, and {name} is a "
                    f"{type(value).__name__}; use zo_cuda_graph=False."
                )
        return tensors, (self.rows, self._factor, self._in_front, tuple(sorted(others.items())))

    def reading(self, tensors: Mapping[str, Tensor]) -> ModelLoss:
        """Return the same loss with other tensors in place of those of `pass_inputs`."""
        loss = copy.copy(self)
        loss.inputs = loss._inputs = {name: tensors.get(name, value) for name, value in self._inputs.items()}
        loss._num_items = tensors.get(_ITEMS, self._num_items)
        return loss

    def losses_of_rows(self) -> RowLosses:
        """Return the loss of every row by itself, (rows,), from one forward pass; see `known_losses.losses_of_rows`.

        Raises:
            NotBatchable: the model's loss does not come apart by rows.
        """
        layout = self._separable_layout(self._checks.grouped)
        if self._needs_chunks():
            losses = means_of_rows(self._losses_in_chunks(self._inputs), targets_of(self._model, self._inputs))
        else:
            losses = losses_of_rows(self._model, self._logits(), self._inputs)
        self._checks.grouped.add(layout)
        return RowLosses(losses)

    def _shares(self, logits: Tensor, groups: int, group_of: Tensor | None = None) -> Tensor:
        """Return the shares of the groups in the loss of one probe, (groups,), from its logits, (rows, ...)."""
        return shares_of_groups(self._model, logits, self._inputs, self._num_items, groups, group_of)

    def _needs_chunks(self, copies: int = 1) -> bool:
        """Return whether the logits of a forward pass over `copies` of the batch are many, and can come in chunks."""
        may = self._divides and self._is_stock and not self._in_front
        if not may or self._checks.in_chunks is False or self._checks.is_known is False:
            return False
        head = ChunkedHead(self._forward, self._model)
        positions = self._inputs["labels"].shape[-1] if self.kept is None else len(self.kept)
        if self.rows * copies * positions <= chunked_head.TOKENS or not head.takes(self._inputs):
            return False
        if self._checks.in_chunks is None:
            self._checks.in_chunks = head.agrees(self._copied(copies), self._num_items)
        return self._checks.in_chunks

    def _sums_in_chunks(self, groups: int, copies: int = 1) -> Tensor:
        """Return the share of each of `groups` equal groups of rows in the batch's loss, or the loss of each copy of it."""
        divisor = divisor_of(self._model, targets_of(self._model, self._inputs), self._num_items)
        return sums_of_groups(self._losses_in_chunks(self._copied(copies)), groups) / divisor

    def _losses_in_chunks(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the losses of a batch's tokens, (rows, positions)."""
        without = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels", "logits_to_keep")}
        targets = targets_of(self._model, inputs)
        return ChunkedHead(self._forward, self._model).losses(without, targets, self.kept)

    def _copied(self, copies: int, without: Container[str] = ()) -> dict[str, Any]:
        """Return a batch of `copies` times the rows, without some of the inputs."""
        inputs = {name: value for name, value in self._inputs.items() if name not in without}
        return repeated(inputs, self.rows, copies)

    @property
    def kept(self) -> Tensor | None:
        """Positions for which the model computes logits, int64 (positions,); None if for all."""
        kept = self._inputs.get("logits_to_keep")
        return kept if isinstance(kept, Tensor) else None

    def _logits(self, copies: int = 1) -> Tensor:
        """Return the logits of one forward pass over `copies` of the batch, (copies · rows, ...).

        Where it is due, the loss of the pass is compared before.

        Raises:
            NotBatchable: the model's loss is not the known function of its logits.
        """
        compares, count = self._must_compare, None
        makes_inputs_of_labels = self._model.config.is_encoder_decoder
        without = () if compares or makes_inputs_of_labels else ("labels", "shift_labels")
        inputs = self._copied(copies, without)
        if makes_inputs_of_labels:
            # Many ignore the count, so the comparison is with the count.
            count = self._num_items if compares else None
            inputs |= {} if count is None else {"num_items_in_batch": count}
        outputs = self._forward(**inputs)
        if compares:
            self._note_precision(outputs["loss"])
            known = known_loss(self._model, outputs["logits"], inputs, count)
            self._checks.is_known = same_but_for_order(outputs["loss"], known)
            if not self._checks.is_known:
                raise NotBatchable("the model's loss has terms of its own")
        return outputs["logits"]

    def _note_precision(self, own: Tensor) -> None:
        """Note whether differences of the model's own loss, (), are lost in its dtype."""
        is_half = own.dtype in HALF
        self._checks.sums_in_half = is_half and loss_kind(self._model) in IN_DTYPE_OF_LOGITS

    def _loss(self, logits: Tensor) -> Tensor:
        """Return the loss of one probe from its logits, (rows, ...)."""
        inputs = self._inputs
        if self._checks.sums_in_half:
            logits, inputs = logits.float(), {**inputs, "labels": to_float(inputs["labels"])}
        return known_loss(self._model, logits, inputs, self._num_items)

    def _separable_layout(self, evaluated: set[tuple[tuple[str, bool], ...]]) -> tuple[tuple[str, bool], ...]:
        """Return which inputs carry the rows.

        Args:
            evaluated: layouts of the batches that have been evaluated in the same way; empty before the first.

        Raises:
            NotBatchable: rows of this batch cannot be told apart.
        """
        if self._in_front:
            raise NotBatchable("PEFT makes one prompt for all rows of a batch")
        if self._checks.is_known is False:
            raise NotBatchable("the model's loss has terms of its own")
        layout = self._layout()
        if evaluated and layout not in evaluated:
            raise NotBatchable("the batch has other inputs than the first one")
        return layout

    @property
    def _must_compare(self) -> bool:
        """True if nothing guarantees that the model's loss still is the known function of its logits."""
        return not self._is_stock or may_change_outputs(self._model) or self._checks.is_known is None

    @property
    def is_settled(self) -> bool:
        """True if no evaluation of this batch looks at the values of outputs, other than for the loss."""
        return self._checks.is_known is not None and not self._must_compare

    def _layout(self) -> tuple[tuple[str, bool], ...]:
        """Return which inputs carry the rows."""
        names = [name for name in self._inputs if name not in ("logits_to_keep", "shift_labels")]
        return tuple((name, _carries_rows(name, self._inputs[name], self.rows)) for name in sorted(names))


def repeated(inputs: Mapping[str, Any], rows: int, copies: int) -> dict[str, Any]:
    """Return a batch `copies` times, end to end.

    Args:
        inputs: the batch.
        rows: its rows.
        copies: the number of copies.

    Raises:
        NotBatchable: an input describes the sequences within a row.
    """
    within = next((name for name in inputs if name in _WITHIN_ROWS), None)
    if within is not None and copies > 1:
        raise NotBatchable(f"{within} describes the sequences of this batch, which is free of padding")
    return {
        name: value.repeat(copies, *[1] * (value.ndim - 1))
        if copies > 1 and _carries_rows(name, value, rows)
        else value
        for name, value in inputs.items()
    }


def _carries_rows(name: str, value: Any, rows: int) -> bool:
    # The list of logit positions is shared by all rows, even if it has as many entries as there are rows.
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows and name != "logits_to_keep"


def _has_stock_forward(model: PreTrainedModel) -> bool:
    """Return whether code of transformers computes the model's output: no forward or `loss_function` of the user's own."""
    loss_function = getattr(type(model), "loss_function", None)
    if "_loss_function" in model.__dict__ or loss_function is not PreTrainedModel.loss_function:
        return False
    own = model.__dict__.get("forward")
    replaced = own is not None and inspect.unwrap(own) not in (
        type(model).forward,
        inspect.unwrap(type(model).forward),
    )
    return type(model).forward.__module__.startswith("transformers.") and not replaced


def _is_on_several_devices(model: nn.Module) -> bool:
    return len(computing_devices(model)) > 1


def only_labeled_logits(
    model: PreTrainedModel, inputs: Mapping[str, Any], in_front: int = 0, labels_on_host: Tensor | None = None
) -> dict[str, Any]:
    """Return inputs with which a causal model computes logits only at positions that predict a label.

    All rows share one list of positions: those that any row of the batch needs. The inputs stay as they are if the
    model does not support this, or if most positions carry a label. `in_front` and `labels_on_host` are as in `ModelLoss`.
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
        or _is_on_several_devices(model)  # the positions and the tensor they index would be on different devices
    ):
        return inputs
    found = labeled_positions(inputs["labels"], labels_on_host)
    if found is not None:
        positions, targets = found
        inputs |= {"logits_to_keep": positions + in_front if in_front else positions, "shift_labels": targets}
    return inputs
