"""Forward hooks that may change what a model returns, such as a user's, and those that are known to leave it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Hook = TypeVar("Hook", bound=Callable[..., Any])

_HARMLESS: set[Any] = set()


def leaves_outputs(hook: Hook) -> Hook:
    """Declare that a function, used as a forward hook, leaves outputs as they are."""
    _HARMLESS.add(hook)
    return hook


def may_change_outputs(module: nn.Module) -> bool:
    """Return whether a module has a forward hook that has not been declared by `leaves_outputs`."""
    return any(getattr(hook, "__func__", hook) not in _HARMLESS for hook in module._forward_hooks.values())
