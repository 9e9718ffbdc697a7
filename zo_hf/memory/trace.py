"""Memory traces of code that runs on tensors with a shape and without values.

Operations run on torch's fake tensors: every shape, dtype and alias is computed as in a real run, but nothing is
allocated. `MemoryTrace` adds up the storages that are alive, so the peak is that of the operations that a model
executes, for any architecture. It works on real tensors as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from zo_hf.directions import ELEMENTWISE


class MemoryTrace(TorchDispatchMode):
    """Context manager that tracks the storages of tensors created inside it.

    It does not see memory that a kernel allocates and frees within one operation.

    Args:
        known: tensors that exist already and are not counted.

    Attributes:
        live: bytes of the storages that were created inside and are still alive.
        peak: the largest `live` since the last `end_phase`.
        phases: the peaks of the phases that have ended.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.phases: list[int] = []
        self._storages: dict[int, weakref.ref] = {}
        for tensor in known:
            self._track(tensor, counts=False)

    def end_phase(self) -> None:
        """Append the peak to `phases`, and begin a new phase."""
        self.phases.append(self.peak)
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self._track(output)
        elif isinstance(output, tuple | list):
            for part in output:
                if isinstance(part, Tensor):
                    self._track(part)
                elif isinstance(part, tuple | list):  # as _foreach operations return
                    for inner in part:
                        if isinstance(inner, Tensor):
                            self._track(inner)
        return output

    def _track(self, tensor: Tensor, counts: bool = True) -> None:
        if tensor.device.type == "meta":  # a tensor used for its shape alone
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes() if counts else 0

        def release(_: Any) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, release)
        self.live += size
        self.peak = max(self.peak, self.live)


@contextmanager
def without_values() -> Iterator[None]:
    """Make torch's operations compute shapes alone, without memory or arithmetic, while the context is open."""
    for distribution in ELEMENTWISE.values():  # fill their cached tables now, which must not consist of fake tensors
        distribution.decode(torch.zeros(1, 2, dtype=torch.int64))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
