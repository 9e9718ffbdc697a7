"""Shared code of recipes that time steps of a Trainer: rows of random tokens, and a clock."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback


class RandomRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of random tokens of OPT's vocabulary, of which the last is a label.

    Args:
        rows: number of rows.
        length: tokens in a row.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.rows, self.length = rows, length

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(7, 50_000, (self.length,), generator=torch.Generator().manual_seed(index))
        labels = torch.full_like(ids, -100)
        labels[-1] = ids[-1]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Seconds(NamedTuple):
    """The time of a step, in seconds."""

    processor: float
    on_clock: float


class StepClock(TrainerCallback):
    """Notes the time of every step.

    Attributes:
        steps: the times, in order.
    """

    def __init__(self) -> None:
        self.steps: list[Seconds] = []
        self._began = Seconds(0.0, 0.0)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Note when a step begins."""
        self._began = Seconds(time.process_time(), time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note how long it took."""
        began = self._began
        self.steps.append(Seconds(time.process_time() - began.processor, time.perf_counter() - began.on_clock))
