"""Parameters that a loss holds from before a step, as in `self.penalized = list(model.parameters())`.

No read of a module shows such a use. A mode of torch's sees every operation instead, and gives the moved tensor to those that
take a parameter outside of its module's forward. It costs some microseconds an operation, so it goes on after a run's
first step only if that step has needed it. Code that torch compiles is left alone. So are models with offloaded weights, whose
loader works on the parameters themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# These work on the parameters themselves: `Module.to` would even write the moved values into them.
_ON_PARAMETERS = {nn.Module._apply.__code__, nn.Parameter.__deepcopy__.__code__}
# Compiled code calls operations on the inputs of a graph, where no module's forward runs any more.
_COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch")


class HeldParameters(TorchFunctionMode):
    """Replaces parameters in the arguments of operations.

    Args:
        moved: returns the moved tensor of a parameter, or None for one that stays as it is.
        leaves_alone: True for an operation that does not read the values of its arguments.

    Attributes:
        has_replaced: True if an operation has taken a parameter from outside of its module's forward.
    """

    def __init__(self, moved: Callable[[nn.Parameter], Tensor | None], leaves_alone: Callable[[Any], bool]) -> None:
        super().__init__()
        self._moved, self._leaves_alone = moved, leaves_alone
        self.has_replaced = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (torch.compiler.is_compiling() or self._leaves_alone(function) or _writes(function)):
            args = self._replaced(args)
            kwargs = {name: self._replaced(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)

    def _replaced(self, value: Any) -> Any:
        if type(value) is nn.Parameter:
            moved = self._moved(value) if _reads_for_a_loss() else None
            self.has_replaced = self.has_replaced or moved is not None
            return value if moved is None else moved
        if type(value) in (list, tuple):  # torch.stack, torch._foreach_norm
            return type(value)(map(self._replaced, value))
        return value


def _reads_for_a_loss() -> bool:
    """Return False if the present operation is one of this package, of compiled code, or of torch on the parameters themselves."""
    frame: Any = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")  # generated code has none
        if not module or module.startswith(_COMPILERS) or frame.f_code in _ON_PARAMETERS:
            return False
        package = module.partition(".")[0]
        if module != __name__ and package != "torch":
            return bool(package != "zo_hf")
        frame = frame.f_back
    return True


def _writes(function: Any) -> bool:
    """Return True for a setter or a method that writes its tensor, which is to write the parameter itself."""
    name = function.__name__
    return name == "__set__" or (name.endswith("_") and not name.endswith("__"))
