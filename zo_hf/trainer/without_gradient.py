"""The places where a loss switches gradients off, as by `torch.no_grad()`.

While a probe is evaluated, gradients are off everywhere, so that their mode does not tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_map

from zo_hf.subspaces.containers import is_record, with_values


class WithoutGradient:
    """Knows where a loss has switched gradients off.

    Args:
        constant: stands in for a tensor that a module returns there.

    Attributes:
        is_active: True where the loss has switched them off.
    """

    def __init__(self, constant: Callable[[Any], Any]) -> None:
        self._constant = constant
        self._entered: list[tuple[Any, bool]] = []  # the context managers, each with whether it switches gradients on
        self._handles: list[Any] = []
        self._depth = 0  # of calls of modules

    @property
    def is_active(self) -> bool:
        return bool(self._entered) and not self._entered[-1][1]

    @property
    def makes_constants(self) -> bool:
        """True if gradients are off, and no module is running, whose results are intermediate."""
        return self.is_active and not self._depth

    def see(self, enabled: bool, frame: Any) -> None:
        """Take note of a switch, made by the code that runs in a frame."""
        owner, method = None, ""
        while frame is not None and frame.f_globals.get("__name__") == "torch.autograd.grad_mode":
            owner, method, frame = frame.f_locals.get("self"), frame.f_code.co_name, frame.f_back
        if owner is None or frame is None or is_engines(frame):
            return
        if method == "__exit__":
            self._entered = [one for one in self._entered if one[0] is not owner]
        elif not any(one[0] is owner for one in self._entered):
            self._entered.append((owner, enabled))
        if not self._entered:
            self.leave()
        elif not self._handles:
            self._handles = [
                register_module_forward_pre_hook(self._begin),
                register_module_forward_hook(self._end, always_call=True),
            ]

    def leave(self) -> None:
        """Forget all switches."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._entered, self._depth = [], [], 0

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._depth += 1

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._depth -= 1
        if not self.makes_constants:
            return None
        with torch._C.DisableTorchFunction():
            return self._constants(output)

    def _constants(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._constant(output)
        return with_values(output, self._constants) if is_record(output) else tree_map(self._constant, output)


def is_engines(frame: Any) -> bool:
    """Return whether a frame runs code of this package."""
    return str(frame.f_globals.get("__name__", "")).startswith("zo_hf.")
