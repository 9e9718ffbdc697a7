"""Memory traces of one step of each kind: a bare forward pass, a step of the engine, and a backward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.chunked_head import ChunkedHead
from zo_hf.evaluation.known_losses import loss_kind
from zo_hf.evaluation.model_loss import LossChecks, ModelLoss
from zo_hf.memory.assumptions import Assumptions
from zo_hf.memory.model import layers, tensors
from zo_hf.memory.subspaces import TracedLowRank
from zo_hf.memory.trace import MemoryTrace
from zo_hf.rules import SeededSGD
from zo_hf.subspaces import Full, Subspace
from zo_hf.subspaces.peft_methods import base_model

# Newer versions of transformers use the first name, and warn about the second.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing_enable" in PreTrainedModel.__dict__
    else "gradient_checkpointing"
)


@dataclass(frozen=True)
class Usage:
    """The memory of a step in addition to the weights.

    Args:
        moves: number of coordinates, or of weights that a backward pass trains.
        state: bytes kept from step to step, except those of the optimizer: coordinates, directions, gradients.
        phases: peak bytes in each phase of a step, including the state.
        passes: rows of each forward pass of a step.
    """

    moves: int
    state: int
    phases: tuple[int, ...]
    passes: tuple[int, ...]


def inference(model: Any, given: Assumptions) -> Usage:
    """Trace a forward pass over the batch, with logits at the last position and the key-value cache of `generate`."""
    last = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    with torch.no_grad(), MemoryTrace(tensors(model)) as trace:
        model(**_batch(given), use_cache=True, **last)
    return Usage(0, 0, (trace.peak,), (given.batch_size,))


def zeroth_order(model: Any, make: Callable[[], Subspace], given: Assumptions) -> Usage:
    """Trace two steps of the engine, so that the second step includes the state that the first leaves behind.

    Args:
        model: a transformers model, or PEFT's wrapper around one.
        make: creates the subspace.
        given: the assumptions about the run.
    """
    inner: Any = base_model(model)
    with MemoryTrace(tensors(model)) as trace:
        subspace = make()
        zo = _engine(model, subspace, given)
        try:
            trace.end_phase()
            # A step after the first, which compares the loss with the known function of the logits.
            checks = LossChecks(is_known=True, in_chunks=ChunkedHead(model, inner).may_divide())
            inputs, divides = _labeled(inner, given), not isinstance(subspace, Full)
            loss = ModelLoss(model, inner, inputs, lambda inputs: model(**inputs).loss, checks=checks, divides=divides)
            groups = 1 if zo.row_groups is None else zo.row_groups.count or 1
            for _ in range(2):
                with rows_of_passes(inner) as passes:
                    zo.probe(loss)
                zo.discard()
                trace.end_phase()
                zo.apply([1.0] * given.num_directions * groups, skipped=False)
                if isinstance(subspace, Full):
                    SeededSGD(subspace.coordinates.values(), subspace).step()
                trace.end_phase()
            del loss
            state = trace.live
            if isinstance(subspace, TracedLowRank) and subspace.fold_steps:
                subspace.read_before_fold()
                trace.end_phase()
                subspace.fold_largest_tile()
                subspace.draw_bases(1)
                trace.end_phase()
        finally:
            subspace.detach()
        moves = subspace.dimension
        subspace.clear_gradient()
    return Usage(moves, state, tuple(trace.phases), tuple(passes))


def _engine(model: nn.Module, subspace: Subspace, given: Assumptions) -> ZerothOrder:
    """Return an engine that decides nothing by values, because traced tensors have none."""
    is_for_rows = given.rows_per_direction != "auto" or subspace.takes_groups_cheaply
    rows_per_direction = given.rows_per_direction if is_for_rows else 0
    zo = ZerothOrder(
        model,
        subspace,
        num_directions=given.num_directions,
        rows_per_direction=rows_per_direction,
        direction=given.direction,
        batched_probes=not rows_per_direction if given.batched == "auto" else given.batched,
        common_random_numbers=False,  # a comparison of generators needs values
    )
    if zo.row_groups is not None:
        zo.row_groups.comes_apart = True
        zo.row_groups.expect(given.batch_size, 1)
    return zo


@contextmanager
def rows_of_passes(model: PreTrainedModel) -> Iterator[list[int]]:
    """Enter a context that yields a list, to which every forward pass of the model adds its number of rows."""
    rows: list[int] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        rows.append(len(args[0] if args else kwargs["hidden_states"]))

    hook = layers(model)[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()


def backward(model: nn.Module, given: Assumptions, checkpointing: bool) -> Usage:
    """Trace a step of the stock Trainer in mixed precision, with logits at all positions and saved activations.

    Args:
        model: a model whose trainable parameters are float32.
        given: the assumptions about the run.
        checkpointing: save only the inputs of the layers, and recompute the rest in the backward pass.
    """
    inner: Any = base_model(model)
    if checkpointing:
        # The saved states of random generators are not tensors on the model's device.
        getattr(inner, f"{CHECKPOINTING}_enable")({"use_reentrant": False, "preserve_rng_state": False})
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    inputs = _batch(given)
    with MemoryTrace(tensors(model)) as trace, _AttentionWithoutDropout():

        def enter_last_layer(_: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.requires_grad and not trace.phases:
                # Until the backward pass of the last layer ends, memory grows with activations; afterwards with
                # gradients.
                hidden.register_hook(lambda gradient: trace.end_phase())

        hook = layers(inner)[-1].register_forward_pre_hook(enter_last_layer, with_kwargs=True)
        with torch.autocast("cpu", getattr(torch, given.dtype)):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        hook.remove()
        loss.backward()
        del loss
        trace.end_phase()
        state = trace.live
    model.eval()
    if checkpointing:
        getattr(inner, f"{CHECKPOINTING}_disable")()
    for parameter in trainable:
        parameter.grad = None
    return Usage(sum(p.numel() for p in trainable), state, tuple(trace.phases), (given.batch_size,))


class _AttentionWithoutDropout(TorchFunctionMode):
    """Disables dropout in attention: the traced CPU kernel would store the scores for it, and GPU kernels do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


def _batch(given: Assumptions) -> dict[str, Tensor]:
    ids = torch.zeros(given.batch_size, given.sequence_length, dtype=torch.int64)
    # transformers skips a mask of ones only if it can read the values, so a traced mask is always used.
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if given.padded else {"input_ids": ids}


def _labeled(model: Any, given: Assumptions) -> dict[str, Any]:
    """Return the batch with labels, and with the label positions that `ModelLoss` would derive from their values."""
    inputs: dict[str, Any] = _batch(given)
    inputs["labels"] = torch.zeros_like(inputs["input_ids"])
    if not _keeps_logits(model):
        return inputs
    if given.labels is not None and given.labels <= given.sequence_length // 2:
        inputs["logits_to_keep"] = torch.zeros(given.labels, dtype=torch.int64)
        inputs["shift_labels"] = torch.zeros(given.batch_size, given.labels, dtype=torch.int64)
    else:
        inputs["logits_to_keep"] = 0  # 0 means all; given explicitly, because labels without values cannot be read
    return inputs


def _keeps_logits(model: Any) -> bool:
    return loss_kind(model) is not None and "logits_to_keep" in inspect.signature(model.forward).parameters
