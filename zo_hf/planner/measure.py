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
from zo_hf.planner.assumptions import OPTIMIZER_COPIES, Assumptions
from zo_hf.planner.model import size_in_bytes, tensors
from zo_hf.planner.trace import MemoryTrace, equal_layers_once
from zo_hf.probes.model_loss import ModelLoss, loss_kind
from zo_hf.subspaces import Full, LowRank, Subspace
from zo_hf.zeroth_order import ZerothOrder

# Newer versions of transformers call it by the first name and warn of the second.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing_enable" in PreTrainedModel.__dict__
    else "gradient_checkpointing"
)


@dataclass(frozen=True)
class Usage:
    """What a way takes beside the weights.

    Args:
        moves: number of coordinates, or of weights that a backward pass trains.
        state: bytes that stay from step to step: coordinates, directions, gradients, the optimizer's own.
        working: bytes more at the peak of a step: activations, logits, scratch.
    """

    moves: int
    state: int
    working: int


def inference(model: Any, given: Assumptions) -> Usage:
    """A forward pass over the batch with logits at the last position, keeping keys and values as `generate` does."""
    last = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    with torch.no_grad(), MemoryTrace(tensors(model)) as trace:
        model(**_batch(given), use_cache=True, **last)
    return Usage(moves=0, state=0, working=trace.peak)


def zeroth_order(model: Any, make: Callable[[], Subspace], given: Assumptions) -> Usage:
    """Steps of the engine; what the first leaves behind is there in the second.

    Args:
        model: a transformers model, or PEFT's wrapper of one.
        make: makes the subspace.
    """
    inner: Any = base_model(model)
    with MemoryTrace(tensors(model)) as trace, equal_layers_once(inner):
        subspace = make()
        zo = ZerothOrder(
            model, subspace, num_directions=given.num_directions, direction=given.direction, batched=given.batched
        )
        try:
            loss = ModelLoss(model, inner, _labelled(inner, given), lambda inputs: model(**inputs).loss)
            for _ in range(2):
                zo.probe(loss)
                zo.discard()
                zo.apply([1.0] * given.num_directions, skipped=False)
                if isinstance(subspace, Full):
                    SeededSGD(subspace.coordinates.values(), subspace).step()
            del loss
            state = trace.live
            if isinstance(subspace, LowRank):
                subspace.draw_bases(1)
        finally:
            subspace.detach()
        kept, scratch = (0, 0) if isinstance(subspace, Full) else _optimizer(subspace.dimension, given.optimizer)
        peak = max(trace.peak, state + scratch)
        moves = subspace.dimension
        subspace.clear_gradient()
    return Usage(moves, state + kept, peak - state)


def backward(model: nn.Module, given: Assumptions, checkpointing: bool) -> Usage:
    """A step of the stock Trainer with `bf16=True` or `fp16=True` and AdamW: every position's logits, activations saved.

    Args:
        model: has trainable parameters in float32.
        checkpointing: save only the inputs of the layers, and compute the rest again in the backward.
    """
    inner = base_model(model)
    if checkpointing:
        # The state of random generators, saved per layer, is no tensor of the model's device.
        getattr(inner, f"{CHECKPOINTING}_enable")({"use_reentrant": False, "preserve_rng_state": False})
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    inputs = _batch(given)
    with MemoryTrace(tensors(model)) as trace, _AttentionWithoutDropout():
        with torch.autocast("cpu", getattr(torch, given.dtype)):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        del loss
        gradients = trace.live
    model.eval()
    if checkpointing:
        getattr(inner, f"{CHECKPOINTING}_disable")()
    for parameter in trainable:
        parameter.grad = None
    moves = sum(p.numel() for p in trainable)
    kept, scratch = _optimizer(moves, "adamw")
    peak = max(trace.peak, gradients + scratch)
    return Usage(moves, gradients + kept, peak - gradients)


class _AttentionWithoutDropout(TorchFunctionMode):
    """Attention kernels of a GPU drop out without holding the scores; a CPU's, which are traced, cannot."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


def _optimizer(moves: int, name: str) -> tuple[int, int]:
    """Bytes of an optimizer's state, and of the scratch in its step, for float32 numbers."""
    copies = OPTIMIZER_COPIES[name]
    return 4 * moves * copies, 4 * moves if name == "adamw" else 0


def _batch(given: Assumptions) -> dict[str, Tensor]:
    ids = torch.zeros(given.batch_size, given.sequence_length, dtype=torch.int64)
    # Without values a mask cannot be found to be all ones, so one that is given is used.
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if given.padded else {"input_ids": ids}


def _labelled(model: Any, given: Assumptions) -> dict[str, Tensor]:
    """The batch with labels, and with the positions that `ModelLoss` would find to carry one."""
    inputs = _batch(given)
    inputs["labels"] = torch.zeros_like(inputs["input_ids"])
    if given.labels is not None and given.labels <= given.sequence_length // 2 and _keeps_logits(model):
        inputs["logits_to_keep"] = torch.zeros(given.labels, dtype=torch.int64)
        inputs["shift_labels"] = torch.zeros(given.batch_size, given.labels, dtype=torch.int64)
    return inputs


def _keeps_logits(model: Any) -> bool:
    return loss_kind(model) is not None and "logits_to_keep" in inspect.signature(model.forward).parameters


__all__ = ["Usage", "backward", "inference", "size_in_bytes", "zeroth_order"]
