"""Callables in front of the forwards of modules, by which a subspace gets between a module and its callers.

The function in front is called as `function(subspace, module, previous, *args, **kwargs)`, where `previous` is the forward that
the module has had in its own table, or None.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

#: Where a forward may stand in a module's own table. accelerate's hook moves the inputs to the device of a dispatched
#: module, and then calls `_old_forward`.
_HOOKED, _PLAIN = "_old_forward", "forward"


class Entry(functools.partial):
    """A callable that a subspace puts in front of a method of a module.

    A partial, not a closure, so that a deep copy of the model gets entries that refer to the copy.
    """


def enter(module: nn.Module, function: Callable[..., Any], subspace: Any) -> None:
    """Put a function in front of the module's forward."""
    key = _HOOKED if "_hf_hook" in module.__dict__ else _PLAIN
    module.__dict__[key] = Entry(function, subspace, module, module.__dict__.get(key))


def leave(module: nn.Module) -> None:
    """Undo `enter`."""
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
