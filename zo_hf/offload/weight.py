"""One weight that is kept off the device that computes: where its value is read, and where a new value goes.

accelerate leaves such a weight on the meta device. Its value is in the CPU's memory, in the files of the model, or in the
offload folder. A new value in memory replaces the old one. On the disk it goes to a file of this process, because the other
files are the base of the next run. That file has no name, so nothing of it remains when the process ends, however it ends.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn


class OffloadedWeight:
    """A parameter or buffer that accelerate keeps off the device that computes; tied ones are one weight.

    Args:
        placeholder: what stands for it in its modules, on the meta device.
        source: where its value is read.
        key: its name there.
        device: the device that computes with it.
        in_memory: True if the source holds a tensor in the CPU's memory, False if it reads the disk.
        folder: the folder for its own file; None if accelerate was given none.

    Attributes:
        places: the modules that hold it, with its name there.
        writes: number of times that it was written.
        has_value: False if the source lacks it, as the disk does a new head of a model.
    """

    def __init__(
        self,
        placeholder: Tensor,
        source: Mapping[str, Tensor],
        key: str,
        device: torch.device,
        in_memory: bool,
        folder: str | None,
    ) -> None:
        self.placeholder, self.device = placeholder, device
        self.places: list[tuple[nn.Module, str]] = []
        self.writes, self.has_value = 0, True
        self._source, self._key = source, key
        self._in_memory, self._folder = in_memory, folder
        self._own: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Size of the value in bytes."""
        return self.placeholder.numel() * self.placeholder.element_size()

    def value(self) -> Tensor:
        """Return the present value, on the CPU; read it only."""
        if self.writes:
            return self.kept()
        return self._source[self._key].detach().to("cpu", self.placeholder.dtype)

    def write(self, value: Tensor) -> None:
        """Replace the value.

        Args:
            value: the new value, of the same shape, on any device.

        Raises:
            ValueError: see `reserve`.
        """
        self.reserve()
        assert self._own is not None
        self._own.copy_(value)
        self.writes += 1

    def reserve(self) -> None:
        """Make sure that there is room for a new value, before anything depends on it.

        Raises:
            ValueError: accelerate was given no folder, or the folder has no room.
        """
        if self._own is None:
            self._own = self.value() if self._in_memory else self._room()

    def copy(self) -> Tensor:
        """Return a copy of the value that takes as little of the CPU's memory as the value itself: in memory, or in a file."""
        room = torch.empty_like(self.placeholder, device="cpu") if self._in_memory else self._room()
        return room.copy_(self.value())

    def kept(self) -> Tensor:
        """Return the present value where it is kept: in the CPU's memory, or in the file of this process."""
        if not self.writes:
            self.write(self.value())
        assert self._own is not None
        return self._own

    def _room(self) -> Tensor:
        shape, dtype = self.placeholder.shape, self.placeholder.dtype
        if self._folder is None:
            raise ValueError(
                "the model is read from its own files on the disk, which training must not write; give from_pretrained an "
                "offload_folder=... for the trained weights."
            )
        try:
            return _in_file(shape, dtype, self._folder)
        except OSError as error:
            raise ValueError(
                f"offload_folder={self._folder!r} cannot hold the trained weights beside the model ({error.strerror}); give "
                "from_pretrained a folder with room for one copy of the model, and one more for a checkpoint."
            ) from error


def _in_file(shape: torch.Size, dtype: torch.dtype, folder: str) -> Tensor:
    """Return a tensor in a file without a name, which the system keeps in memory only while there is room."""
    if not shape.numel():
        return torch.empty(shape, dtype=dtype)
    os.makedirs(folder, exist_ok=True)
    handle, path = tempfile.mkstemp(dir=folder, prefix="zo_hf-")
    try:
        size = shape.numel() * dtype.itemsize
        if sys.platform == "linux":
            os.posix_fallocate(handle, 0, size)  # writing into a hole of a full disk would end the process
        else:
            os.truncate(handle, size)
        return torch.from_file(path, shared=True, size=shape.numel(), dtype=dtype).view(shape)
    finally:
        os.close(handle)
        with suppress(PermissionError):  # Windows keeps a file that is in use
            os.unlink(path)
