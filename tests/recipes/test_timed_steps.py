"""The clock and the rows of recipes that time steps of a Trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from common.timed_steps import RandomRows, StepClock

from tests.conftest import seeded, tiny_opt
from zo_hf import ZOConfig, ZOTrainer


def test_every_step_is_timed_and_rows_are_the_same_every_time(tmp_path: Path) -> None:
    rows = RandomRows(4, 6)
    assert all(torch.equal(rows[i]["input_ids"], rows[i]["input_ids"]) for i in range(len(rows)))
    assert not torch.equal(rows[0]["input_ids"], rows[1]["input_ids"])
    assert (rows[2]["labels"][:-1] == -100).all() and rows[2]["labels"][-1] == rows[2]["input_ids"][-1]
    clock = StepClock()
    args = ZOConfig(str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], save_strategy="no")
    model = seeded(tiny_opt, vocab_size=50_000)
    ZOTrainer(model, args, train_dataset=rows, callbacks=[clock]).train()
    assert len(clock.steps) == 3 and all(step.on_clock > 0 and step.processor > 0 for step in clock.steps)
