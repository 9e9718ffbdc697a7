"""Memory of the device for one block at a time.

On CUDA a block is copied into page-locked memory of the CPU, and from there to the device in a stream of its own, so that the
copy of the next block runs while the device computes with this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zo_hf.offload.block import Block


class Slot:
    """Memory for one block.

    Args:
        device: the device that computes.
        size: size of the memory in bytes.
        copies: the stream of the copies; None for a device that copies while the CPU waits.

    Attributes:
        block: the block whose values are here, or on their way; None at first.
        in_use: True while modules hold tensors of this memory.
    """

    def __init__(self, device: torch.device, size: int, copies: torch.cuda.Stream | None) -> None:
        self.block: Block | None = None
        self.in_use = False
        self._device, self._copies = device, copies
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._writes: list[int] = []
        if copies is not None:
            self._locked = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self._arrived, self._left = torch.cuda.Event(), torch.cuda.Event()
            self._left.record(torch.cuda.current_stream(device))

    def has(self, block: Block) -> bool:
        """Return True if the block's present values are here, or on their way."""
        return self.block is block and self._writes == [weight.writes for weight in block.weights]

    def fill(self, block: Block) -> None:
        """Load a block, or begin to."""
        self.block, self._writes = None, [weight.writes for weight in block.weights]
        views = block.views(self._memory)
        if self._copies is None:
            for weight, view in zip(block.weights, views, strict=True):
                view.copy_(weight.value())
        else:
            self._arrived.synchronize()  # the last copy still reads the page-locked memory
            self._copies.wait_event(self._left)
            with torch.cuda.stream(self._copies):
                for weight, locked, view in zip(block.weights, block.views(self._locked), views, strict=True):
                    view.copy_(locked.copy_(weight.value()), non_blocking=True)
                self._arrived.record(self._copies)
        self.block = block

    def take(self) -> list[Tensor]:
        """Return the block's tensors, once they have arrived, for use until `give_back`."""
        assert self.block is not None
        self.in_use = True
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived)
        return self.block.views(self._memory)

    def close(self) -> None:
        """Wait for a copy that is under way, because the memory may be given to others next."""
        if self._copies is not None:
            self._arrived.synchronize()

    def give_back(self) -> None:
        """End the use of the tensors, by operations that the device may still have to run."""
        self.in_use = False
        if self._copies is not None:
            self._left.record(torch.cuda.current_stream(self._device))
