"""Memory of tensors that have a shape and no values.

Operations run on torch's fake tensors: every shape, dtype and alias is computed as in a real run, nothing is allocated.
`MemoryTrace` adds up the storages that are alive, so the peak is that of the very operations which a model executes,
whatever its architecture. It works on real tensors as well.
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
    """Context manager that follows the storages of tensors made inside it.

    Memory that a kernel takes and gives back inside one operation is not seen.

    Args:
        known: tensors that are there before, which do not count.

    Attributes:
        live: bytes of what was made inside and is still alive.
        peak: the largest `live` since the last `end_phase`.
        phases: the peaks of the phases that have ended.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.phases: list[int] = []
        self._storages: dict[int, weakref.ref] = {}
        for tensor in known:
            self._follow(tensor, counts=False)

    def end_phase(self) -> None:
        """Note the peak, and measure the next one from here."""
        self.phases.append(self.peak)
        self.peak = self.live

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
    for distribution in ELEMENTWISE.values():  # their tables are cached, and must not be made of fake tensors
        distribution.decode(torch.zeros(1, 2, dtype=torch.int64))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
