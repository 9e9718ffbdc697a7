"""Weights that are divided among processes: one process's part of a tensor, and the whole tensor gathered again.

FSDP2 gives every process some rows of every tensor. A pipeline gives it some tensors as a whole, see `absent`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from zo_hf.parallel.absent import first_holder, has_absent


def is_sharded(tensor: Any) -> bool:
    """Return True if `tensor` is a DTensor.

    The placements tell, because the class cannot be imported in builds of torch without torch.distributed.
    """
    return hasattr(tensor, "placements")


def class_name(model: nn.Module) -> str:
    """Return the name of a model's own class, in front of which FSDP2 puts its name while weights are sharded."""
    return type(model).__name__.removeprefix("FSDP")


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """Return this process's part of `tensor`, and the index of the part's first element in the whole tensor.

    The part shares the memory of `tensor`. FSDP shards the first dimension as torch.chunk does, so the part has the
    shape (rows of this process, ...). A plain tensor is its own part.
    """
    if not is_sharded(tensor):
        return tensor.detach(), 0
    sharded: Any = tensor.detach()
    mesh, rows = sharded.device_mesh, len(sharded)
    first_row = 0
    for dimension, placement in enumerate(sharded.placements):
        if not placement.is_replicate():
            assert placement.is_shard(0), (
                f"expected a shard of the first dimension, as FSDP makes by default, but got {placement}"
            )
            first_row = min(-(-rows // mesh.size(dimension)) * mesh.get_local_rank(dimension), rows)
    return sharded.to_local(), first_row * (sharded.numel() // max(rows, 1))


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of `whole` that corresponds to this process's part of `like`, a tensor of the same shape."""
    part, first = local_part(like)
    return whole.reshape(-1)[first : first + part.numel()].view(part.shape)


def gather(part: Tensor, like: Tensor) -> Tensor:
    """Gather a whole tensor from the parts of all processes; every process must call this function.

    The result is meant for saving: it is on the CPU in the first process of each machine, and on meta in the others.

    Args:
        part: part of this process, of the shape of its part of `like`.
        like: tensor with the shards to gather, or a parameter of a pipeline, which the first process of all gets. If it is
            plain, the function returns `part` itself.
    """
    holder = first_holder(like)
    if holder is not None:
        return _fetched(part, like, holder)
    if not is_sharded(like):
        return part
    whole = shard_like(part, like).full_tensor()
    return whole.to("cpu" if os.environ.get("LOCAL_RANK", "0") == "0" else "meta")


def _fetched(part: Tensor, like: Tensor, holder: int) -> Tensor:
    """Return a whole tensor on the first process, sent by the first process that holds it, and one on meta elsewhere.

    Args:
        part: the tensor, which only holders have.
        like: a parameter of its shape and dtype, on the device on which processes communicate.
        holder: the rank of the first holder.
    """
    rank = dist.get_rank()
    if rank == holder != 0:
        dist.send(_as_bytes(part.to(like.device).contiguous()), 0)
    if rank != 0:
        return torch.empty_like(like, device="meta")
    if holder == 0:
        return part
    whole = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    dist.recv(_as_bytes(whole), holder)
    return whole.cpu()


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)  # not every backend knows every dtype


def gathered_state_dict(model: nn.Module, frozen: bool = True) -> dict[str, Tensor]:
    """Return the state dict of a model with its shards gathered by `gather`; every process must call this function.

    Args:
        model: the model, sharded or not.
        frozen: True includes the weights that do not train.
    """
    reshard(model)
    state = model.state_dict(keep_vars=True)
    wanted = {name: t for name, t in state.items() if frozen or t.requires_grad or not _is_divided(t)}
    return {name: gather(local_part(t)[0], t) for name, t in wanted.items()}


def _is_divided(tensor: Tensor) -> bool:
    return is_sharded(tensor) or first_holder(tensor) is not None


def is_divided_model(model: nn.Module) -> bool:
    """Return True if this process holds only a part of the model."""
    return is_sharded_model(model) or has_absent(model)


def is_sharded_model(model: nn.Module) -> bool:
    """Return True if FSDP2 manages the model, even if all of its parameters are gathered and plain after a forward."""
    return next(_sharded_modules(model), None) is not None


def reshard(model: nn.Module) -> None:
    """Free the gathered weights that FSDP keeps after a forward, so that later writes go to the shards."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> Iterator[Any]:
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        yield from (module for module in model.modules() if isinstance(module, FSDPModule))


def shard_like(part: Tensor, like: Any) -> Any:
    """Wrap this process's part of a tensor as a DTensor of the shape and placements of `like`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
