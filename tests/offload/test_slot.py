"""On CUDA a copy waits for whoever still uses the memory, and the device waits for the copy; here with stand-ins for CUDA."""

from __future__ import annotations

import torch
from torch import nn

from tests.offload.conftest import Timeline
from zo_hf.offload.block import Block
from zo_hf.offload.slot import Slot
from zo_hf.offload.weight import OffloadedWeight


def block_of(value: torch.Tensor) -> tuple[Block, OffloadedWeight]:
    layer = nn.Linear(3, 2, bias=False, device="meta")
    cpu = torch.device("cpu")
    weight = OffloadedWeight(layer.weight, {"w": value}, "w", cpu, in_memory=True, folder=None)
    weight.places.append((layer, "weight"))
    return Block(layer, {layer}, [weight]), weight


def test_copies_and_computation_wait_for_each_other(cuda: Timeline) -> None:
    first, second = torch.randn(2, 3), torch.randn(2, 3)
    slot = Slot(torch.device("cpu"), 256, torch.cuda.Stream())
    for value in (first, second):
        block, _ = block_of(value)
        cuda.told.clear()
        slot.fill(block)
        assert cuda.told == ["host waits for arrived", "copies waits for left", "copies notes arrived"]
        (tensor,) = slot.take()
        assert torch.equal(tensor, value)
        slot.give_back()
        assert cuda.told[3:] == ["computation waits for arrived", "computation notes left"]
    cuda.told.clear()
    slot.close()
    assert cuda.told == ["host waits for arrived"]


def test_a_value_that_has_been_written_since_is_loaded_again() -> None:
    block, weight = block_of(torch.zeros(2, 3))
    slot = Slot(torch.device("cpu"), 256, None)
    slot.fill(block)
    assert slot.has(block) and not slot.has(block_of(torch.zeros(2, 3))[0])
    weight.write(torch.ones(2, 3))
    assert not slot.has(block)
    slot.fill(block)
    assert torch.equal(slot.take()[0], torch.ones(2, 3))
