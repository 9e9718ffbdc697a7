"""Buffers that a forward writes, such as running means: every probe of a step begins with the same, and leaves them.

A forward in evaluation mode seldom writes one, but a batch norm that its model keeps in training mode does, and so do counters.
Otherwise the second probe would see other buffers than the first, and a replay, which has no data, other ones than the run.
Buffers outside of the state dict are caches, which belong to other attributes of their module, and stay as they are.

A buffer that is None until a forward makes it is None again, too. It may hold a mean of the first probe's values, which the second
probe would then read, and a state dict with it would not fit a new model.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

#: Elements of the largest buffer that is copied before it is known whether a forward writes it.
MOST_ELEMENTS = 2**22


@dataclass
class _Before:
    module: nn.Module
    name: str
    tensor: Tensor | None
    version: int
    copy: Tensor | None


class KeptBuffers:
    """The buffers in a model's state dict.

    Args:
        model: the model.
        quantized: its quantized layers, whose buffers hold codes that no forward writes.
    """

    def __init__(self, model: nn.Module, quantized: Collection[nn.Module] = ()) -> None:
        self._modules = [module for module in model.modules() if module._buffers and module not in quantized]
        self._written: set[tuple[nn.Module, str]] = set()
        self._made: set[tuple[nn.Module, str]] = set()
        self._has_run = False

    @contextmanager
    def kept(self, runs: bool = True) -> Iterator[None]:
        """Restore the buffers after this context.

        Args:
            runs: True if the model surely runs in the context, which then shows what its forward writes.

        Raises:
            ValueError: a large buffer has been written, of which there is no copy; the message names it.
        """
        before = [
            self._before(module, name, tensor)
            for module in self._modules
            for name, tensor in module._buffers.items()
            if name not in module._non_persistent_buffers_set
        ]
        try:
            yield
        finally:
            with torch.no_grad():
                lost = [entry for entry in before if not self._restore(entry)]
        self._has_run = self._has_run or runs
        for entry in lost:
            written = f"the forward of {type(entry.module).__name__} has written its buffer {entry.name!r}"
            if entry.tensor is not None and entry.tensor.numel() > MOST_ELEMENTS:
                raise ValueError(
                    f"{written}, which probes must leave as it is; write it in training mode only, or register it with "
                    "persistent=False."
                )
            logger.warning(
                "%s for the first time; from now on, every probe begins with the values that it has now", written
            )

    def _before(self, module: nn.Module, name: str, tensor: Tensor | None) -> _Before:
        if tensor is None or tensor.is_meta or tensor.is_inference():
            return _Before(module, name, tensor, 0, None)
        is_copied = (module, name) in self._written if self._has_run else tensor.numel() <= MOST_ELEMENTS
        return _Before(module, name, tensor, tensor._version, tensor.clone() if is_copied else None)

    def _restore(self, before: _Before) -> bool:
        """Restore a buffer; return False if it has been written and there is no copy."""
        module, name, tensor = before.module, before.name, before.tensor
        now = module._buffers.get(name)
        if any(value is not None and value.is_meta for value in (now, tensor)):
            return True  # offloaded: the forward has written a copy, which is gone
        if now is not tensor:
            module._buffers[name] = tensor
        if tensor is None and now is not None and (module, name) not in self._made:
            self._made.add((module, name))
            logger.warning(
                "the forward of %s makes its buffer %r, which is None again after every probe; make it in __init__, or "
                "register it with persistent=False to keep it",
                type(module).__name__,
                name,
            )
        if tensor is None or tensor.is_inference():
            return True
        key = (module, name)
        is_same = key not in self._written and tensor._version == before.version
        # Batch norm's kernel writes without a new version.
        if is_same and (before.copy is None or torch.equal(tensor, before.copy)):
            return True
        if not self._written:
            logger.warning(
                "the forward of %s writes its buffer %r; every probe begins with the buffers from before the run, and the "
                "run leaves them so",
                type(module).__name__,
                name,
            )
        self._written.add(key)
        if before.copy is not None:
            tensor.copy_(before.copy)
        return before.copy is not None
