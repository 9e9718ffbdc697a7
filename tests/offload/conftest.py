"""Stand-ins for CUDA's streams and events, on a machine that has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch


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
        def __init__(self, device: Any = None, name: str = "copies") -> None:
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
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(name=timeline.stream))
    return timeline
