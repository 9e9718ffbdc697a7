"""Parameters that a loss holds from before a step, as in `self.penalized = list(model.parameters())`.

No read of a module shows such a use. A mode of torch's sees every operation instead, and gives the moved tensor to those that
take a parameter outside of its module's forward. It costs some microseconds an operation. So it is on in a run's first step and
in every `LOOK_EVERY`-th, and in all steps after one that has needed it. Code that torch compiles is left alone. So are models with
offloaded weights, whose loader works on the parameters themselves.

A loss that writes a parameter is refused. It would write values that it has read at a probe into the weights, as one does
that swaps weights in and back; or its write would be lost with the moved tensor. `zo_hf.evaluation.written_parameters` finds the
writes in place of all steps, after them. What differentiates by a parameter is refused as well, because torch would differentiate by another
tensor than the one that the loss has read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

# These work on the parameters themselves. `Module.to` would even write the moved values into them, and a state dict that is
# loaded again, too.
_ON_PARAMETERS = {
    function.__code__
    for function in (
        nn.Module._apply,
        nn.Module._save_to_state_dict,
        nn.Module._load_from_state_dict,
        nn.Parameter.__deepcopy__,
        nn.Parameter.__reduce_ex__,
    )
}
# Compiled code calls operations on the inputs of a graph, where no module's forward runs any more.
_COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch._aot_autograd", "torch._functorch.aot_autograd")
_WRITERS = {"__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__ipow__"}
#: Attribute of the tensors that stand for a parameter, and of their views: its name.
NAME = "_zo_held"
#: Steps from one look at a loss to the next.
LOOK_EVERY = 256


class HeldParameters(TorchFunctionMode):
    """Replaces parameters in the arguments of operations.

    Args:
        name_of: returns the name of a parameter that moves here, or None for one that stays as it is.
        moved: returns the moved tensor of a parameter that moves here.
        leaves_alone: True for an operation that does not read the values of its arguments.

    Attributes:
        has_replaced: True if an operation has taken a parameter from outside of its module's forward.
    """

    def __init__(
        self,
        name_of: Callable[[nn.Parameter], str | None],
        moved: Callable[[nn.Parameter], Tensor],
        leaves_alone: Callable[[Any], bool],
    ) -> None:
        super().__init__()
        self._name_of, self._moved, self._leaves_alone = name_of, moved, leaves_alone
        self.has_replaced = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or self._leaves_alone(function):
            return function(*args, **kwargs)
        written = args[:1] if writes(function) else ()
        refuse_write((*written, kwargs.get("out")), self._name_of)
        self._refuse_derivative(function, args, kwargs)
        if not written or type(written[0]) is not nn.Parameter:
            args = (*written, *self._replaced(args[len(written) :]))
            kwargs = {name: self._replaced(value) for name, value in kwargs.items()}
        result = function(*args, **kwargs)
        name = getattr(args[0], NAME, None) if args else None
        if name is not None and isinstance(result, Tensor) and _share_memory(args[0], result):
            setattr(result, NAME, name)
        return result

    def _replaced(self, value: Any) -> Any:
        if type(value) is nn.Parameter:
            name = self._name_of(value)
            if name is None or not _reads_for_a_loss():
                return value
            moved = self._moved(value)
            self.has_replaced = True
            return moved
        if type(value) in (list, tuple):  # torch.stack, torch._foreach_norm
            return type(value)(map(self._replaced, value))
        return value

    def _refuse_derivative(self, function: Any, args: Any, kwargs: Any) -> None:
        """Refuse `torch.autograd.grad` by a parameter, and what `torch.func` has wrapped a parameter for."""
        by = (*args, *kwargs.values()) if function is torch.autograd.grad else map(_unwrapped, args)
        for value in by:
            for tensor in value if type(value) in (list, tuple) else (value,):
                name = None if type(tensor) is Tensor else _name_of(tensor, self._name_of)  # a moved one is right
                if name is not None and _reads_for_a_loss():
                    raise ValueError(
                        f"the loss gives {name} to torch.func or torch.autograd, which do not see that a probe has moved it; "
                        "give them p.clone(), or p.clone().requires_grad_()."
                    )


def refuse_write(written: Iterable[Any], name_of: Callable[[nn.Parameter], str | None]) -> None:
    """Refuse to write a parameter, or a tensor that stands for one.

    Args:
        written: what an operation writes: tensors, or lists of them.
        name_of: returns the name of a parameter that moves here, or None for one that stays as it is.

    Raises:
        ValueError: a loss writes it.
    """
    for value in written:
        if type(value) in (list, tuple):
            refuse_write(value, name_of)
            continue
        name = _name_of(value, name_of)
        if name is not None and _reads_for_a_loss():
            raise ValueError(writes_of(name))


def writes_of(name: str) -> str:
    """Return the message for a loss that writes a parameter."""
    return (
        f"the loss writes {name}, and a probe must leave the weights as they are; write it between steps, in a "
        "callback's on_step_end, or write into a copy of the model."
    )


def _name_of(value: Any, name_of: Callable[[nn.Parameter], str | None]) -> str | None:
    if not isinstance(value, Tensor):
        return None
    return name_of(value) if type(value) is nn.Parameter else getattr(value, NAME, None)


def _unwrapped(value: Any) -> Any:
    """Return the tensor that transforms of `torch.func` have wrapped, or None for a value that is none of theirs."""
    found = None
    while isinstance(value, Tensor) and is_functorch_wrapped_tensor(value):
        value = found = get_unwrapped(value)
    return found._base if type(found) is Tensor and found._is_view() else found  # jvp makes a view


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


def writes(function: Any) -> bool:
    """Return True for a setter or a method that writes its tensor."""
    name = function.__name__
    return name in _WRITERS or (name.endswith("_") and not name.endswith("__"))


def _share_memory(x: Tensor, other: Tensor) -> bool:
    if is_functorch_wrapped_tensor(x) or is_functorch_wrapped_tensor(other):  # these have no memory
        return False
    return x.untyped_storage()._cdata == other.untyped_storage()._cdata
