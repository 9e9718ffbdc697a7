"""Running a module with other tensors instead of its parameters, without touching the module.

The forward runs on a stand-in: a module of the same class that shares everything with the original except its table of
parameters. A child module that holds some of the parameters has a stand-in of its own. The original never changes, so
an exception or an interrupt in the middle of a forward leaves nothing to restore.

`torch.func.functional_call` cannot do this:

- It swaps the parameters of the original module and swaps them back after the call. Meanwhile every hook sees the
  changed module, and accelerate's offloading hook even overwrites the new parameters.
- It swaps back after an exception or an interrupt in the forward, but a KeyboardInterrupt during one of the swaps
  leaves the module changed.
- It calls the module itself. The function that a subspace puts in front of the forward would therefore call itself.
- It takes one set of parameters per call and casts nothing. The code below would still be needed for groups of rows
  with parameters of their own, and for a half-precision module that computes in float32.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.subspaces.containers import is_record, with_values
from zo_hf.subspaces.entries import MEMBERS, Members, forward_of
from zo_hf.subspaces.layer_inputs import LINEAR

HALF = (torch.float16, torch.bfloat16)
_READ_ALL = (*LINEAR, nn.Embedding.forward)


def held(module: nn.Module, path: str) -> Tensor | None:
    """Return the parameter at a dotted path from `module`, as the module at the end of the path holds it now."""
    *children, name = path.split(".")
    for child in children:
        module = module._modules[child]  # type: ignore[assignment]
    return module._parameters[name]


def functional_call(
    module: nn.Module, parameters: Mapping[str, Tensor | None], args: Sequence, kwargs: Mapping
) -> Any:
    """Compute `module.forward(*args, **kwargs)` as if its parameters were `parameters`.

    If a float32 tensor replaces a half-precision parameter, the module computes in float32, and its output is cast
    back. A perturbation below the precision of the weight then survives.

    Args:
        module: the module, which stays unchanged.
        parameters: tensors of the parameters' shapes, by name, or by dotted path if a child module holds the
            parameter.
        args: positional inputs.
        kwargs: inputs by keyword.
    """
    half = upcast_from(module, parameters)
    if half is not None:
        inside = any("." in path for path in parameters)
        others = module.named_parameters(recurse=inside, remove_duplicate=False)
        parameters = dict(others) | dict(parameters)
        parameters = {path: None if t is None else to_float(t) for path, t in parameters.items()}
        args, kwargs = map_tensors(args, to_float), map_tensors(kwargs, to_float)
    output = forward_of(module)(with_parameters(module, parameters), *args, **kwargs)
    return map_tensors(output, lambda t: t.to(half) if t.dtype == torch.float32 else t) if half is not None else output


def upcast_from(module: nn.Module, parameters: Mapping[str, Tensor | None]) -> torch.dtype | None:
    """Return the module's half precision if one of these parameters needs more, as in `functional_call`; else None."""
    replaced = [held(module, path) for path in parameters]
    half = next((p.dtype for p in replaced if p is not None and p.dtype in HALF), None)
    return half if any(t is not None and t.dtype not in HALF for t in parameters.values()) else None


def run_upcast(function: Callable, dtype: torch.dtype, args: Sequence, kwargs: Mapping) -> Any:
    """Compute `function(args, kwargs)` in float32 and cast its output back to `dtype`, that of the model around it."""
    output = function(map_tensors(args, to_float), map_tensors(kwargs, to_float))
    return map_tensors(output, lambda t: t.to(dtype) if t.dtype == torch.float32 else t)


def with_parameters(module: nn.Module, parameters: Mapping[str, Tensor | None]) -> nn.Module:
    """Make a stand-in that shares everything with `module` except these parameters, down to those of children."""
    stand_in = object.__new__(type(module))
    stand_in.__dict__.update(module.__dict__)
    own: dict[str, Tensor | None] = {}
    inside: dict[str, dict[str, Tensor | None]] = {}
    for path, tensor in parameters.items():
        first, _, rest = path.partition(".")
        if rest:
            inside.setdefault(first, {})[rest] = tensor
        else:
            own[first] = tensor
    stand_in.__dict__["_parameters"] = {**module._parameters, **own}
    members = module.__dict__.get(MEMBERS)
    if isinstance(members, Members):
        # A proxy, because a cycle would keep the moved parameters until a garbage collection.
        stand_in.__dict__[MEMBERS] = Members(members.func, *members.args[:-1], weakref.proxy(stand_in))
    if isinstance(module, nn.RNNBase):  # it reads its parameters from a list
        stand_in.__dict__["_flat_weights"] = [stand_in._parameters[name] for name in module._flat_weights_names]
    if inside:
        children = dict(module._modules)
        for name, tensors in inside.items():
            child = module._modules[name]
            assert child is not None
            children[name] = _callable_as(with_parameters(child, tensors), child)
        stand_in.__dict__["_modules"] = children
    return stand_in


def _callable_as(stand_in: nn.Module, child: nn.Module) -> nn.Module:
    """Make a child's stand-in callable: remove the entries before its forward, but keep accelerate's hook.

    The entries would lead to the child itself.
    """
    for key in ("forward", "_old_forward"):
        stand_in.__dict__.pop(key, None)
    hook = child.__dict__.get("_hf_hook")
    if hook is not None:
        stand_in.__dict__["forward"] = functools.partial(_hooked_forward, hook, stand_in)
    return stand_in


def _hooked_forward(hook: Any, stand_in: nn.Module, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = hook.pre_forward(stand_in, *args, **kwargs)
    return hook.post_forward(stand_in, type(stand_in).forward(stand_in, *args, **kwargs))


def reads_all_parameters(module: nn.Module) -> bool:
    """Return True if the module's forward reads each of its parameters, without looking them up by name each time."""
    return isinstance(module, nn.RNNBase) or forward_of(module) in _READ_ALL


def to_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply `function` to the tensors in `value`, at one level of containers; see `with_values`."""
    if isinstance(value, Tensor):
        return function(value)
    if is_record(value) and not any(isinstance(getattr(value, f.name, None), Tensor) for f in fields(value)):
        return value  # such as a config
    return with_values(value, lambda item: function(item) if isinstance(item, Tensor) else item)
