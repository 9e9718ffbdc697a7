"""One step of each kind, traced: a bare forward, a step of the engine, a backward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from zo_hf.model_setup import base_model
from zo_hf.optimizers import SeededSGD
from zo_hf.planner.assumptions import Assumptions
from zo_hf.planner.model import layers, tensors
from zo_hf.planner.subspaces import TracedLowRank
from zo_hf.planner.trace import MemoryTrace
from zo_hf.probes.model_loss import ModelLoss, loss_kind
from zo_hf.subspaces import Full, Subspace
from zo_hf.zeroth_order import ZerothOrder

# Newer versions of transformers call it by the first name and warn of the second.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing_enable" in PreTrainedModel.__dict__
    else "gradient_checkpointing"
)


@dataclass(frozen=True)
class Usage:
    """What a step takes beside the weights.

    Args:
        moves: number of coordinates, or of weights that a backward pass trains.
        state: bytes that stay from step to step, but for the optimizer's own: coordinates, directions, gradients.
        phases: peak bytes in each phase of a step, the state included.
    """

    moves: int
    state: int
    phases: tuple[int, ...]


def inference(model: Any, given: Assumptions) -> Usage:
    """A forward pass over the batch with logits at the last position, keeping keys and values as `generate` does."""
    last = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    with torch.no_grad(), MemoryTrace(tensors(model)) as trace:
        model(**_batch(given), use_cache=True, **last)
    return Usage(0, 0, (trace.peak,))


def zeroth_order(model: Any, make: Callable[[], Subspace], given: Assumptions) -> Usage:
    """Two steps of the engine: what the first leaves behind is there in the second.

    Args:
        model: a transformers model, or PEFT's wrapper of one.
        make: makes the subspace.
    """
    inner: Any = base_model(model)
    with MemoryTrace(tensors(model)) as trace:
        subspace = make()
        zo = ZerothOrder(
            model, subspace, num_directions=given.num_directions, direction=given.direction, batched=given.batched
        )
        try:
            trace.end_phase()
            loss = ModelLoss(model, inner, _labelled(inner, given), lambda inputs: model(**inputs).loss)
            for _ in range(2):
                zo.probe(loss)
                zo.discard()
                trace.end_phase()
                zo.apply([1.0] * given.num_directions, skipped=False)
                if isinstance(subspace, Full):
                    SeededSGD(subspace.coordinates.values(), subspace).step()
                trace.end_phase()
            del loss
            state = trace.live
            if isinstance(subspace, TracedLowRank) and subspace.fold_steps:
                subspace.fold_largest_tile()
                subspace.draw_bases(1)
                trace.end_phase()
        finally:
            subspace.detach()
        moves = subspace.dimension
        subspace.clear_gradient()
    return Usage(moves, state, tuple(trace.phases))


def backward(model: nn.Module, given: Assumptions, checkpointing: bool) -> Usage:
    """A step of the stock Trainer with `bf16=True` or `fp16=True`: every position's logits, activations saved.

    Args:
        model: has trainable parameters in float32.
        checkpointing: save only the inputs of the layers, and compute the rest again in the backward.
    """
    inner: Any = base_model(model)
    if checkpointing:
        # The state of random generators, saved per layer, is no tensor of the model's device.
        getattr(inner, f"{CHECKPOINTING}_enable")({"use_reentrant": False, "preserve_rng_state": False})
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    inputs = _batch(given)
    with MemoryTrace(tensors(model)) as trace, _AttentionWithoutDropout():

        def enter_last_layer(_: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.requires_grad and not trace.phases:
                # Before its backward ends, memory grows with the layers' activations; after it, with their gradients.
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
    return Usage(sum(p.numel() for p in trainable), state, tuple(trace.phases))


class _AttentionWithoutDropout(TorchFunctionMode):
    """Attention kernels of a GPU drop out without holding the scores; a CPU's, which are traced, cannot."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


def _batch(given: Assumptions) -> dict[str, Tensor]:
    ids = torch.zeros(given.batch_size, given.sequence_length, dtype=torch.int64)
    # Without values a mask cannot be found to be all ones, so one that is given is used.
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if given.padded else {"input_ids": ids}


def _labelled(model: Any, given: Assumptions) -> dict[str, Any]:
    """The batch with labels, and with the positions that `ModelLoss` would find to carry one."""
    inputs: dict[str, Any] = _batch(given)
    inputs["labels"] = torch.zeros_like(inputs["input_ids"])
    if not _keeps_logits(model):
        return inputs
    if given.labels is not None and given.labels <= given.sequence_length // 2:
        inputs["logits_to_keep"] = torch.zeros(given.labels, dtype=torch.int64)
        inputs["shift_labels"] = torch.zeros(given.batch_size, given.labels, dtype=torch.int64)
    else:
        inputs["logits_to_keep"] = 0  # all; said here, because labels without values cannot be looked through
    return inputs


def _keeps_logits(model: Any) -> bool:
    return loss_kind(model) is not None and "logits_to_keep" in inspect.signature(model.forward).parameters
