"""On CUDA a copy waits for whoever still uses the memory, and the device waits for the copy; here with stand-ins for CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zo_hf.offload.block import Block
from zo_hf.offload.slot import Slot
from zo_hf.offload.weight import OffloadedWeight


class Timeline:
    """What a device would be told, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.stream = "computation"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Timeline:
    """Let torch.cuda note what it is asked for, and page-locked memory be any memory."""
    timeline = Timeline()

    class Event:
        count = 0

        def __init__(self) -> None:
            Event.count += 1
            self.name = ("arrived", "left")[(Event.count - 1) % 2]

        def record(self, stream: Any) -> None:
            timeline.told.append(f"{stream.name} notes {self.name}")

        def synchronize(self) -> None:
            timeline.told.append(f"host waits for {self.name}")

    class Stream:
        def __init__(self, name: str = "copies") -> None:
            self.name = name

        def wait_event(self, event: Event) -> None:
            timeline.told.append(f"{self.name} waits for {event.name}")

        def __enter__(self) -> None:
            timeline.stream = self.name

        def __exit__(self, *_: Any) -> None:
            timeline.stream = "computation"

    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: real(*size, **options))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(timeline.stream))
    return timeline


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
