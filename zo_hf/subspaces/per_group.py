"""Running a module once for a batch whose groups of rows have parameters of their own.

Two ways, the same to rounding:

- one call: a linear layer is a batched product. The parameters of a norm get a dimension for the rows, and broadcast
  against the activations, because it multiplies and adds them element by element.
- one call per group, and a concatenation of the outputs.

A class of norms takes the first way if a comparison with random parameters finds no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from transformers.cache_utils import Cache

from zo_hf import kernels
from zo_hf.estimators.probe import NotBatchable
from zo_hf.rng import draw
from zo_hf.subspaces.containers import is_record, sequence_like
from zo_hf.subspaces.entries import forward_of, is_entered
from zo_hf.subspaces.functional import HALF, functional_call, map_tensors, upcast_from, with_parameters
from zo_hf.subspaces.layer_inputs import are_positions, is_of_rows, is_transformed, require_ids_of_rows

#: Whether a forward broadcasts, by the forward and the number of dimensions of its input.
_BROADCASTS: dict[tuple[Callable, int], bool] = {}

_NEEDS_SHAPE = (nn.LayerNorm.forward, nn.RMSNorm.forward)


def functional_call_per_group(
    module: nn.Module,
    parameters: Callable[[int], Mapping[str, Tensor]],
    groups: int,
    rows: int,
    args: Sequence,
    kwargs: Mapping,
    stacked: Callable[[], Mapping[str, Tensor]] | None = None,
) -> Any:
    """Compute the module's output with separate parameters for each group of rows in the batch.

    Args:
        module: the module, which stays unchanged.
        parameters: returns the parameters of group g, as `functional_call` takes them.
        groups: number of groups. The first dimension of the inputs contains them in order, unless its size is 1.
        rows: number of rows of the batch in each group.
        args: positional inputs, of shape (groups · rows, ...) or (1, ...).
        kwargs: inputs by keyword, of these shapes.
        stacked: returns the parameters of all groups at once, (groups, *shape) by name; None if it cannot.

    Returns:
        The outputs of the groups, concatenated along the first dimension.

    Raises:
        NotBatchable: the inputs cannot be divided into one equal part per group.
    """
    if groups == 1:
        return functional_call(module, parameters(0), args, kwargs)
    inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim > 0]
    if any(is_entered(child) for child in module.modules() if child is not module):
        raise NotBatchable(f"{type(module).__name__} has both parameters and child modules with parameters")
    if not inputs:
        raise NotBatchable(f"{type(module).__name__} takes no tensor that carries the batch")
    if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
        raise NotBatchable(f"{type(module).__name__} writes keys and values into a cache of the whole batch")
    # A tensor with one row belongs to the whole batch; the first tensor with more rows carries the batch.
    first = next((t for t in inputs if t.shape[0] != 1), inputs[0])
    total = first.shape[0]
    looks_up = isinstance(module, nn.Embedding)
    if looks_up:
        require_ids_of_rows(first, groups, rows)
    elif not (total == 1 or is_of_rows(total, groups, rows)):
        raise NotBatchable(f"{type(module).__name__} sees {total} rows, which {groups} probes cannot share equally")
    if stacked is not None and total != 1 and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        if forward_of(module) is nn.Linear.forward:
            every = stacked()
            if all(value.dtype == args[0].dtype for value in every.values()):
                return _linear(module, every, args[0])
        elif _may_broadcast(module, args[0]):
            every = stacked()
            if all(value.ndim == 2 for value in every.values()) and _broadcasts(module, every, args[0]):
                return _in_one_call(module, every, args[0])
    # An embedding of positions may get the positions of one row beside the ids of all rows.
    dimensions = min(first.ndim, 2) if looks_up else 1
    size = rows if total == 1 else total // groups
    outputs = []
    for group in range(groups):
        own = _Rows(slice(group * size, (group + 1) * size), total, dimensions)
        own_args = tuple(own.of(value) for value in args)
        own_kwargs = {name: own.of(value) for name, value in kwargs.items()}
        output = functional_call(module, parameters(group), own_args, own_kwargs)
        outputs.append(map_tensors(output, lambda tensor: _for_rows(module, tensor, size)))
    return _concatenate(outputs)


@dataclass
class _Rows:
    """The rows of a batch that belong to a group.

    Args:
        rows: the rows of the group.
        total: the rows of the batch; 1 if the inputs have one row that belongs to all groups.
        dimensions: the number of dimensions from which on a tensor carries the batch.
    """

    rows: slice
    total: int
    dimensions: int

    def of(self, value: Any) -> Any:
        """Return the part of an input that belongs to the group: all of it, unless it carries the batch."""
        if self.total == 1:
            return value
        # A list may have one entry per row, such as the name of the row's adapter.
        if isinstance(value, list) and len(value) == self.total and not any(isinstance(v, Tensor) for v in value):
            return map_tensors(value[self.rows], self._part)
        return map_tensors(value, self._part)

    def _part(self, tensor: Tensor) -> Tensor:
        carries_batch = tensor.ndim >= self.dimensions and tensor.shape[0] == self.total
        return tensor[self.rows] if carries_batch else tensor


def _for_rows(module: nn.Module, output: Tensor, rows: int) -> Tensor:
    """Return an output with a group's rows: position embeddings are looked up once for the whole batch."""
    if output.ndim == 0:
        raise NotBatchable(f"{type(module).__name__} returns a number for the whole batch")
    return output.expand(rows, *output.shape[1:]) if output.shape[0] == 1 else output


def looked_up_per_group(
    module: nn.Module, weights: Tensor, rows: int, args: Sequence, kwargs: Mapping
) -> Tensor | None:
    """Look ids up in the weight of their group, in one call; None where a lookup is more than that.

    Args:
        module: an embedding.
        weights: the weight of every group, (groups, ids, n).
        rows: rows of the batch in each group.
        args: the ids of all groups in order, int64 (groups · size, ...).
        kwargs: inputs by keyword.

    Returns:
        (groups · size, ..., n)
    """
    groups = len(weights)
    if forward_of(module) is not nn.Embedding.forward or kwargs or len(args) != 1 or groups == 1:
        return None
    ids = args[0]
    if (
        ids.ndim < 2
        or are_positions(ids)
        or ids.shape[0] == 1
        or not (is_of_rows(ids.shape[0], groups, rows) or (ids.ndim == 3 and ids.shape[0] == groups))
        or forward_ad.unpack_dual(weights).tangent is not None
    ):
        return None
    group = torch.arange(groups, device=ids.device)[:, None]
    return weights[group, ids.reshape(groups, -1)].view(*ids.shape, -1)


def _concatenate(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, tuple | list):
        return sequence_like(first, (_concatenate(list(parts)) for parts in zip(*outputs, strict=True)))
    if isinstance(first, Mapping) or is_record(first):
        raise NotBatchable(f"a module that is run once for every probe returns a {type(first).__name__}")
    return first


def _linear(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute a linear layer in one product for all groups.

    x: (groups · size, ..., n) -> (groups · size, ..., m)
    """
    every = {**module._parameters, **parameters}
    weight, bias = every["weight"], every["bias"]
    assert weight is not None
    groups = next(len(value) for value in parameters.values())
    output = x.reshape(groups, -1, x.shape[-1]) @ weight.mT
    if bias is not None:
        output += bias[:, None] if "bias" in parameters else bias
    return output.view(*x.shape[:-1], -1)


def _may_broadcast(module: nn.Module, x: Tensor) -> bool:
    """Return True for a norm or a module like it: code of torch or transformers, without children."""
    if next(module.children(), None) is not None or x.ndim < 2 or not x.is_floating_point():
        return False
    forward = forward_of(module)
    return forward in _NEEDS_SHAPE or forward.__module__.startswith("transformers.")


def _in_one_call(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Call the module once.

    Args:
        module: the module.
        parameters: those of every group, (groups, d), by name.
        x: the input, (groups · size, ..., d).
    """

    by_kernel = _by_kernel(module, parameters, x)
    if by_kernel is not None:
        return by_kernel
    groups = len(next(iter(parameters.values())))
    parts = x.reshape(groups, -1, *x.shape[1:])
    own = {name: value.reshape(groups, *[1] * (x.ndim - 1), -1) for name, value in parameters.items()}
    forward = forward_of(module)
    if forward not in _NEEDS_SHAPE:
        return functional_call(module, own, (parts,), {}).reshape(x.shape)
    # These two check the shape of their parameters, so the parameters come after them.
    half = upcast_from(module, own)
    stand_in: Any = with_parameters(module, own)
    parts = parts if half is None else parts.float()
    if forward is nn.RMSNorm.forward:
        normal = nn.functional.rms_norm(parts, stand_in.normalized_shape, None, stand_in.eps)
    else:
        normal = nn.functional.layer_norm(parts, stand_in.normalized_shape, None, None, stand_in.eps)
    weight, bias = (getattr(stand_in, name) if name in module._parameters else None for name in ("weight", "bias"))
    # One kernel that computes in float32 and writes half precision, or in place; derivatives know no `out`.
    has_tangent = any(forward_ad.unpack_dual(value).tangent is not None for value in (x, *own.values()))
    out = None
    if half is not None and not has_tangent:
        out = torch.empty_like(normal, dtype=half)
    elif not (has_tangent or torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed()):
        out = normal if all(value.dtype == normal.dtype for value in own.values()) else None
    if weight is not None and bias is not None:
        normal = torch.addcmul(bias, normal, weight, out=out)
    elif weight is not None:
        normal = torch.mul(normal, weight, out=out)
    elif bias is not None:
        normal = torch.add(normal, bias, out=out)
    return (normal if half is None else normal.to(half)).view(x.shape)


def _by_kernel(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor | None:
    """Compute the output of a norm of torch in one launch; the arguments are those of `_in_one_call`.

    Returns:
        None if there is no kernel for it.
    """
    if forward_of(module) not in _NEEDS_SHAPE or torch.compiler.is_compiling():
        return None
    names = {name for name, value in module._parameters.items() if value is not None}
    if "weight" not in names or names != parameters.keys():
        return None
    moved = list(parameters.values())
    has_tangent = any(forward_ad.unpack_dual(value).tangent is not None for value in moved)
    is_float = x.dtype in (*HALF, torch.float32) and all(value.dtype == torch.float32 for value in moved)
    is_launched_here = draw.is_launched(x.device) and kernels.run_on(x.device)
    if has_tangent or not is_float or not is_launched_here:
        return None
    from zo_hf.kernels.moved_norm import moved_norm

    # Read by name, as the forward does, because a read shows that a parameter reaches the loss.
    norm: Any = with_parameters(module, parameters)
    bias = norm.bias if "bias" in names else None
    # torch takes ε from the dtype in which it computes.
    eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    rows, centers = x.reshape(-1, x.shape[-1]).contiguous(), forward_of(module) is nn.LayerNorm.forward
    return moved_norm(rows, norm.weight, bias, eps, centers).view(x.shape)


def compare_ahead(module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Compare the two ways for a module before its forward, where that may be compiled: a compiler cannot compare.

    Args:
        module: the module.
        parameters: those that will differ between groups, by name.
    """
    if not parameters or any(value.ndim != 1 for value in parameters.values()):
        return
    like = next(iter(parameters.values()))
    for dimensions in (2, 3):
        x = like.new_empty(1, *[1] * (dimensions - 2), len(like))
        if _may_broadcast(module, x):
            _broadcasts(module, parameters, x)


def _broadcasts(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> bool:
    """Return whether one call gives what a call per group gives, as found once for a class, from random tensors.

    Args:
        module: the module.
        parameters: those of any number of groups, (..., d), by name.
        x: the input, (..., d).
    """
    known = _known(forward_of(module), x.ndim)
    if known is None:
        has_values = not (x.is_meta or isinstance(x, FakeTensor))  # a plan has none, and decides nothing for a run
        if torch.compiler.is_compiling() or not has_values:
            return False
        generator = torch.Generator().manual_seed(0)

        def random(like: Tensor, *shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(like.device, like.dtype)

        sample = random(x, 4, *[3] * (x.ndim - 2), x.shape[-1])
        stacked = {name: random(value, 2, value.shape[-1]) for name, value in parameters.items()}
        try:
            whole = _in_one_call(module, stacked, sample)
            parts = [
                functional_call(module, {name: value[i] for name, value in stacked.items()}, (part,), {})
                for i, part in enumerate(sample.chunk(2))
            ]
            tolerance = 1e-4 if whole.dtype not in HALF else 2e-2
            known = torch.allclose(whole, torch.cat(parts), rtol=tolerance, atol=tolerance)
        except (RuntimeError, TypeError, ValueError, IndexError):
            known = False
        _BROADCASTS[forward_of(module), x.ndim] = known
    return known


@torch.compiler.assume_constant_result
def _known(forward: Callable, dimensions: int) -> bool | None:
    # A constant, because code that looks it up here would be compiled again when another model adds a class.
    return _BROADCASTS.get((forward, dimensions))
