"""Memory of tensors that have a shape and no values.

Operations run on torch's fake tensors: every shape, dtype and alias is computed as in a real run, nothing is allocated.
`MemoryTrace` adds up the storages that are alive, so the peak is that of the very operations which a model executes,
whatever its architecture. It works on real tensors as well.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from zo_hf.directions import DISTRIBUTIONS


class MemoryTrace(TorchDispatchMode):
    """Context manager that follows the storages of tensors made inside it.

    Memory that a kernel takes and gives back inside one operation is not seen.

    Args:
        known: tensors that are there before, which do not count.

    Attributes:
        live: bytes of what was made inside and is still alive.
        peak: the largest `live` so far.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}
        for tensor in known:
            self._follow(tensor, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self._follow(output)
        elif isinstance(output, tuple | list):
            for part in output:
                if isinstance(part, Tensor):
                    self._follow(part)
                elif isinstance(part, tuple | list):  # the _foreach operations
                    for inner in part:
                        if isinstance(inner, Tensor):
                            self._follow(inner)
        return output

    def _follow(self, tensor: Tensor, counts: bool = True) -> None:
        if tensor.device.type == "meta":  # a shape that code asks about
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes() if counts else 0

        def gone(_: Any) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


@contextmanager
def without_values() -> Iterator[None]:
    """Inside, torch's operations compute shapes alone: no memory, no arithmetic."""
    for distribution in DISTRIBUTIONS.values():  # their tables are cached, and must not be made of fake tensors
        distribution.decode(torch.zeros(1, 2, dtype=torch.int64))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@contextmanager
def equal_layers_once(model: nn.Module) -> Iterator[None]:
    """Inside, of a stack of equal layers only the first computes; the others hand back new tensors like its own.

    Without autograd and a key-value cache an equal layer at the same place in a forward pass takes and gives back the
    same memory, so the peak is that of the whole model, in the time of one layer.
    """
    entered = []
    for stack in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        first_output: dict[Any, Any] = {}
        for layer in stack:
            if "forward" not in layer.__dict__:
                layer.__dict__["forward"] = functools.partial(_once, layer, first_output)
                entered.append(layer)
    try:
        yield
    finally:
        for layer in entered:
            del layer.__dict__["forward"]


def _once(layer: nn.Module, first_output: dict[Any, Any], *args: Any, **kwargs: Any) -> Any:
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    parameters = tuple((name, p.shape, p.dtype) for name, p in layer.named_parameters())
    key = (type(layer), parameters, tuple((t.shape, t.dtype) for t in tensors))
    if key not in first_output:
        output = type(layer).forward(layer, *args, **kwargs)
        first_output[key] = _map(output, lambda t: (t.shape, t.dtype))
        return output
    return _map(first_output[key], lambda like: torch.empty(like[0], dtype=like[1]))


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """A tensor, or a tuple of them, with `function` applied; what it makes of a tensor is mapped back in the same way."""
    if isinstance(value, Tensor) or (isinstance(value, tuple) and value and isinstance(value[0], torch.Size)):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(_map(part, function) for part in value)
    return value
