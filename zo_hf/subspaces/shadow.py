"""Running a module with other tensors in place of its parameters, without touching the module.

A shadow is a module of the same class that shares everything with the original except its table of parameters, and, where
child modules hold some of them, shadows in place of these. The original is never modified, so an exception or an interrupt in the
middle of a forward leaves nothing to restore.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from zo_hf.probes.probe import NotBatchable

HALF = (torch.float16, torch.bfloat16)


class Entry(functools.partial):
    """What stands in front of the forward of a module that a subspace has entered."""


def held(module: nn.Module, path: str) -> Tensor | None:
    """The parameter at a dotted path from `module`, as its module holds it now."""
    *children, name = path.split(".")
    for child in children:
        module = module._modules[child]  # type: ignore[assignment]
    return module._parameters[name]


def run_with(module: nn.Module, parameters: Mapping[str, Tensor | None], args: Sequence, kwargs: Mapping) -> Any:
    """`module.forward(*args, **kwargs)` as if its parameters were `parameters`.

    Where a float32 tensor stands in for a half-precision parameter, the module computes in float32 and its output is
    cast back, so that a perturbation below the weight's own precision is not rounded away.

    Args:
        parameters: by name; those of child modules by dotted path.
    """
    replaced = [held(module, path) for path in parameters]
    half = next((p.dtype for p in replaced if p is not None and p.dtype in HALF), None)
    upcast = half is not None and any(t is not None and t.dtype not in HALF for t in parameters.values())
    if upcast:
        inside = any("." in path for path in parameters)
        others = module.named_parameters(recurse=inside, remove_duplicate=False)
        parameters = dict(others) | dict(parameters)
        parameters = {path: None if t is None else _to_float(t) for path, t in parameters.items()}
        args, kwargs = _map(args, _to_float), _map(kwargs, _to_float)
    output = type(module).forward(_shadow(module, parameters), *args, **kwargs)
    return _map(output, lambda t: t.to(half) if t.dtype == torch.float32 else t) if upcast else output


def run_upcast(function: Callable, dtype: torch.dtype, args: Sequence, kwargs: Mapping) -> Any:
    """`function(args, kwargs)` in float32, inside of a model that computes in `dtype`."""
    output = function(_map(args, _to_float), _map(kwargs, _to_float))
    return _map(output, lambda t: t.to(dtype) if t.dtype == torch.float32 else t)


def _shadow(module: nn.Module, parameters: Mapping[str, Tensor | None]) -> nn.Module:
    """A module that shares everything with `module` but these parameters; a child that holds one has a shadow too."""
    shadow = object.__new__(type(module))
    shadow.__dict__.update(module.__dict__)
    own: dict[str, Tensor | None] = {}
    inside: dict[str, dict[str, Tensor | None]] = {}
    for path, tensor in parameters.items():
        first, _, rest = path.partition(".")
        if rest:
            inside.setdefault(first, {})[rest] = tensor
        else:
            own[first] = tensor
    shadow.__dict__["_parameters"] = {**module._parameters, **own}
    if inside:
        children = dict(module._modules)
        for name, tensors in inside.items():
            child = module._modules[name]
            assert child is not None
            children[name] = _callable_as(_shadow(child, tensors), child)
        shadow.__dict__["_modules"] = children
    return shadow


def _callable_as(shadow: nn.Module, child: nn.Module) -> nn.Module:
    """Whatever stands in front of the child's forward leads to the child itself; of it only accelerate's hook is kept."""
    for key in ("forward", "_old_forward"):
        shadow.__dict__.pop(key, None)
    hook = child.__dict__.get("_hf_hook")
    if hook is not None:
        shadow.__dict__["forward"] = functools.partial(_hooked_forward, hook, shadow)
    return shadow


def _hooked_forward(hook: Any, shadow: nn.Module, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = hook.pre_forward(shadow, *args, **kwargs)
    return hook.post_forward(shadow, type(shadow).forward(shadow, *args, **kwargs))


def _is_entered(module: nn.Module) -> bool:
    return any(isinstance(module.__dict__.get(key), Entry) for key in ("forward", "_old_forward"))


def run_groups(
    module: nn.Module,
    parameters: Callable[[int], Mapping[str, Tensor]],
    groups: int,
    rows: int,
    args: Sequence,
    kwargs: Mapping,
) -> Any:
    """The module's output when each group of rows in the batch has parameters of its own.

    Args:
        parameters: the parameters of group g.
        groups: number of groups; the first dimension of the inputs is theirs, group after group, unless it is 1.
        rows: rows of the batch in each group.

    Raises:
        NotBatchable: the inputs do not have one equal part for every group.
    """
    if groups == 1:
        return run_with(module, parameters(0), args, kwargs)
    inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim > 0]
    if any(_is_entered(child) for child in module.modules() if child is not module):
        raise NotBatchable(f"{type(module).__name__} has both parameters and child modules with parameters")
    if not inputs:
        raise NotBatchable(f"{type(module).__name__} takes no tensor that carries the batch")
    if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
        raise NotBatchable(f"{type(module).__name__} writes keys and values into a cache of the whole batch")
    # A tensor with one row is shared by the whole batch; the first that has more carries the batch.
    total = next((t.shape[0] for t in inputs if t.shape[0] != 1), 1)
    shared = total == 1
    if not shared and total % groups:
        raise NotBatchable(f"{type(module).__name__} sees {total} rows, which {groups} probes cannot share equally")
    size = total // groups

    def part(tensor: Tensor, group: int) -> Tensor:
        carries_batch = not shared and tensor.ndim > 0 and tensor.shape[0] == total
        return tensor[group * size : (group + 1) * size] if carries_batch else tensor

    def own(value: Any, group: int) -> Any:
        # A list may have an entry for every row, such as the names of their adapters.
        by_row = isinstance(value, list) and len(value) == total and not any(isinstance(v, Tensor) for v in value)
        return value[group * size : (group + 1) * size] if by_row and not shared else value

    def repeated(tensor: Tensor) -> Tensor:
        # Position embeddings are looked up once and broadcast over the batch: repeat them for this group's rows.
        if tensor.ndim == 0:
            raise NotBatchable(f"{type(module).__name__} returns a number for the whole batch")
        return tensor.expand(rows if shared else size, *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor

    outputs = []
    for group in range(groups):

        def pick(tensor: Tensor, group: int = group) -> Tensor:
            return part(tensor, group)

        own_args = tuple(_map(own(value, group), pick) for value in args)
        own_kwargs = {name: _map(own(value, group), pick) for name, value in kwargs.items()}
        output = run_with(module, parameters(group), own_args, own_kwargs)
        outputs.append(_map(output, repeated))
    return _concatenate(outputs)


def _to_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` applied to the tensors in it (one level of tuples, lists and dicts)."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(function(v) if isinstance(v, Tensor) else v for v in value)
    if isinstance(value, Mapping):
        return {k: function(v) if isinstance(v, Tensor) else v for k, v in value.items()}
    return value


def _concatenate(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, tuple | list):
        return type(first)(_concatenate(list(parts)) for parts in zip(*outputs, strict=True))
    if isinstance(first, Mapping):
        raise NotBatchable("a module that is run once for every probe returns a mapping")
    return first
