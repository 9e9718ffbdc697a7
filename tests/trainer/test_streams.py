"""A run over a stream that ends and starts again resumes with the batches that it would have seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from tests.conftest import TinyTask, assert_same_bits, seeded, tiny_opt, weights_of
from tests.trainer.runs import make_trainer
from zo_hf import ZOTrainer

ROWS = 10  # five batches, so a pass ends after every fifth


class Stream(IterableDataset):
    """Rows in the same order in every pass."""

    def __init__(self) -> None:
        self.task = TinyTask(ROWS)

    def order(self) -> list[int]:
        return list(range(ROWS))

    def __iter__(self) -> Iterator[Any]:
        return iter([self.task[i] for i in self.order()])


class CountsItsPasses(Stream):
    """Shuffles anew in every pass, which it counts itself."""

    passes = 0

    def order(self) -> list[int]:
        order = super().order()
        random.Random(self.passes).shuffle(order)
        self.passes += 1
        return order


class WithLength(CountsItsPasses):
    def __len__(self) -> int:
        return ROWS


class IsTold(Stream):
    """Shuffles by the pass that it is told."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> list[int]:
        order = super().order()
        random.Random(self.epoch).shuffle(order)
        return order


def of_datasets() -> Any:
    from datasets import Dataset

    rows = [{name: tensor.tolist() for name, tensor in TinyTask(ROWS)[i].items()} for i in range(ROWS)]
    return Dataset.from_list(rows).to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=5)


STREAMS: dict[str, Callable[[], Any]] = {
    "the same": Stream,
    "counts its passes": CountsItsPasses,
    "has a length": WithLength,
    "is told its pass": IsTold,
    "of datasets": of_datasets,
}


def run(folder: Path, data: Any, resume: str | None = None, **options: Any) -> tuple[ZOTrainer, dict[int, list[Any]]]:
    """The trainer after training, and the batches of every step."""
    seen: dict[int, list[Any]] = {}

    class Watched(ZOTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
            seen.setdefault(self.state.global_step, []).append(inputs["input_ids"].tolist())
            return super().training_step(model, inputs, *args)

    options |= {"per_device_train_batch_size": 2, "max_steps": 12, "save_strategy": "steps", "save_steps": 1}
    model = seeded(tiny_opt, num_hidden_layers=1)
    trainer = make_trainer(folder, model, Watched, more={"train_dataset": data}, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stream_shorter_than_the_run_resumes(tmp_path: Path, stream: str, accumulation: int) -> None:
    """From the end of a pass, and from the middle of one."""
    options = {"gradient_accumulation_steps": accumulation}
    whole, seen = run(tmp_path / "whole", STREAMS[stream](), **options)
    for step in (5, 11):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed, again = run(tmp_path / str(step), STREAMS[stream](), checkpoint, **options)
        assert again == {number: batches for number, batches in seen.items() if number >= step}
        assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
        assert resumed.state.epoch == whole.state.epoch


def test_data_that_is_not_skipped_begins_anew(tmp_path: Path) -> None:
    _, seen = run(tmp_path / "whole", Stream())
    _, again = run(tmp_path / "b", Stream(), str(tmp_path / "whole" / "checkpoint-7"), ignore_data_skip=True)
    assert again[7] == seen[0]
