"""Callables in front of the forwards of modules, by which a subspace gets between a module and its callers.

The function in front is called as `function(subspace, module, previous, *args, **kwargs)`, where `previous` is the forward that
the module has had in its own table, or None.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

#: Where a forward may stand in a module's own table. accelerate's hook moves the inputs to the device of a dispatched
#: module, and then calls `_old_forward`.
_HOOKED, _PLAIN = "_old_forward", "forward"
#: Where a method that somebody has put in place of a module's forward is kept while a subspace stands in front of it.
_METHOD = "_zo_method"
#: The method on which a module's lists of parameters rest.
MEMBERS = "_named_members"


class Entry(functools.partial):
    """A callable that a subspace puts in front of a method of a module.

    A partial, not a closure, so that a deep copy of the model gets entries that refer to the copy.
    """


class Members(functools.partial):
    """A callable that a subspace puts in front of a module's `_named_members`; its last argument is the module."""


def enter(module: nn.Module, function: Callable[..., Any], subspace: Any) -> None:
    """Put a function in front of the module's forward."""
    note_method(module)
    key = _key_of(module)
    module.__dict__[key] = Entry(function, subspace, module, module.__dict__.get(key))


def leave(module: nn.Module) -> None:
    """Undo `enter`."""
    _forget_method(module)
    for key in (_HOOKED, _PLAIN):
        entry = module.__dict__.get(key)
        if isinstance(entry, Entry):
            previous = entry.args[2]
            if previous is None:
                del module.__dict__[key]
            else:
                module.__dict__[key] = previous


def is_entered(module: nn.Module) -> bool:
    """Return whether a function stands in front of the module's forward."""
    return any(isinstance(module.__dict__.get(key), Entry) for key in (_HOOKED, _PLAIN))


def forward_of(module: nn.Module) -> Callable:
    """Return the function that computes a module's output, to be called with the module or a stand-in for it."""
    return module.__dict__.get(_METHOD) or type(module).forward


def function_of(forward: Callable, module: nn.Module) -> Callable | None:
    """Return the function that a forward binds to a module, as a method or a partial does; None if it is anything else."""
    if inspect.ismethod(forward):
        return forward.__func__ if forward.__self__ is module else None
    if isinstance(forward, functools.partial) and forward.args == (module,) and not forward.keywords:
        return forward.func
    return None


def note_method(module: nn.Module) -> bool:
    """Keep the method that somebody has put in place of the forward of this instance, for `forward_of`.

    Returns:
        False if it has a forward that is no method of it, such as a closure over the module.
    """
    own = module.__dict__.get(_key_of(module))
    if isinstance(own, Entry):
        return True
    _forget_method(module)
    if own is None:
        return True
    function = function_of(own, module)
    if function is None:
        return False
    # Liger's norms compute what their classes do, but take one set of parameters.
    is_ligers = function.__module__.startswith("liger_kernel.")
    if function is not type(module).forward and not is_ligers:
        module.__dict__[_METHOD] = function
    return True


def _forget_method(module: nn.Module) -> None:
    module.__dict__.pop(_METHOD, None)


def _key_of(module: nn.Module) -> str:
    return _HOOKED if "_hf_hook" in module.__dict__ else _PLAIN
