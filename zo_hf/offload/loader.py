"""Loads a model's offloaded weights block by block: for its forward passes, and to write new ones.

    forward of a layer:   its block is loaded, unless it has been already → the layer computes → the next block is loaded
    fold:                 a block is loaded → changed → written back → the next one

Two layers are on the device at a time, and one of the modules outside of them. The next layer is the one that came after this
one the last time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.offload.block import Block, blocks_of
from zo_hf.offload.hooks import offload_hook, offloaded_weights
from zo_hf.offload.slot import Slot
from zo_hf.offload.weight import OffloadedWeight


class Loading(functools.partial):
    """The callable that a loader puts in front of the forward of a module."""


class BlockLoader:
    """The blocks of a model, and the memory that they are loaded into.

    Args:
        model: a model with offloaded weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers, self._alone = blocks_of(model)
        self._slots: dict[torch.device, list[Slot]] = {}
        self._others: dict[torch.device, Slot] = {}
        self._after: dict[Block, Block] = {}
        self._last: Block | None = None

    def attach(self) -> None:
        """Load blocks in front of the forwards of their modules; accelerate's hooks then only move inputs and outputs."""
        offloaded_weights(self._model)  # puts back the placeholders that a forward pass since then has replaced
        for module in self._model.modules():
            hook = offload_hook(module)
            if hook is not None:
                hook.offload = False
        for block in (*self._alone, *self._layers):  # a layer that has weights of its own loads all of them at once
            table, forward = block.module.__dict__, block.module.forward
            loading = Loading(_loading_forward, self, block, table.get("forward"))
            table["forward"] = functools.update_wrapper(loading, forward)  # for whoever looks at its signature

    def detach(self) -> None:
        """Restore every forward, and leave loading to accelerate's hooks again."""
        for block in (*self._layers, *self._alone):
            table = block.module.__dict__
            if isinstance(table.get("forward"), Loading):
                previous = table["forward"].args[2]
                table.pop("forward")
                if previous is not None:
                    table["forward"] = previous
        for module in self._model.modules():
            hook = offload_hook(module)
            if hook is not None:
                hook.offload = True
        for slots in self._slots.values():
            for slot in slots:
                slot.close()
        self._slots, self._others, self._after, self._last = {}, {}, {}, None

    @contextmanager
    def loaded(self, block: Block) -> Iterator[None]:
        """Let the block's modules hold its values inside this context."""
        if block.is_held:
            yield
            return
        slot = self._slot_with(block)
        try:
            block.hold(slot.take())
            yield
        finally:
            block.let_go()
            slot.give_back()
        self._begin_next(block)

    def rewrite(self, weights: Collection[OffloadedWeight]) -> Iterator[dict[OffloadedWeight, Tensor]]:
        """Yield the values of weights, on the device, a block at a time; what the caller makes of them is written back.

        Args:
            weights: the weights, of which each comes once.
        """
        missing = set(weights)
        for block in (*self._layers, *self._alone):
            mine = [weight for weight in block.weights if weight in missing]
            if not mine:
                continue
            slot = self._slot_with(block)
            try:
                values = dict(zip(block.weights, slot.take(), strict=True))
                self._begin_next(block)
                yield {weight: values[weight] for weight in mine}
                for weight in mine:
                    weight.write(values[weight])
            finally:
                slot.give_back()
                slot.block = None  # what is there now may never have been written
            missing -= set(mine)

    def _slot_with(self, block: Block) -> Slot:
        """Return memory with the block's values, or with values on their way."""
        if block not in self._layers:
            return self._other_slot(block)
        if self._last is not None:
            self._after[self._last] = block
        self._last = block
        slot = self._free_slot(block)
        if slot is None:  # a layer inside of two others
            slot = Slot(block.device, block.nbytes, None)
        else:
            self._slots[block.device].remove(slot)
            self._slots[block.device].append(slot)
        if not slot.has(block):
            slot.fill(block)
        return slot

    def _other_slot(self, block: Block) -> Slot:
        """Return memory with the values of a module outside of the layers; it keeps them until another one is called."""
        slot = self._others.get(block.device)
        if slot is None or not slot.has(block):
            slot = None
            self._others.pop(block.device, None)  # its memory is free before new one is taken
            slot = self._others[block.device] = Slot(block.device, block.nbytes, None)
            slot.fill(block)
        return slot

    def _free_slot(self, block: Block) -> Slot | None:
        """Return the slot that has a layer, or else the free one that has waited longest; None if none is free."""
        if block.device not in self._slots:
            copies = torch.cuda.Stream(block.device) if block.device.type == "cuda" else None
            size = max(layer.nbytes for layer in self._layers if layer.device == block.device)
            self._slots[block.device] = [Slot(block.device, size, copies) for _ in range(2)]
        free = [slot for slot in self._slots[block.device] if not slot.in_use]
        return next((slot for slot in free if slot.has(block)), free[0] if free else None)

    def _begin_next(self, block: Block) -> None:
        """Begin to load the layer that came after this one the last time."""
        following = self._after.get(block)
        if following is not None:
            slot = self._free_slot(following)
            if slot is not None and not slot.has(following):
                slot.fill(following)


def _loading_forward(
    loader: BlockLoader, block: Block, previous: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> Any:
    forward = functools.partial(type(block.module).forward, block.module) if previous is None else previous
    with loader.loaded(block):
        return forward(*args, **kwargs)
