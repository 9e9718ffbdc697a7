"""Batches of people's own classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import Trainer, default_data_collator

from tests.trainer.runs import logged
from tests.trainer.test_loss_calls import table_trainer


class Frozen(Mapping):
    """A mapping that nobody writes."""

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class OfTwo(Frozen):
    def __init__(self, values: Mapping[str, torch.Tensor], size: int) -> None:
        super().__init__(values)
        self.size = size


@dataclass
class Record:
    x: torch.Tensor
    labels: torch.Tensor
    never_set: str = field(init=False)


class Pair(NamedTuple):
    x: torch.Tensor
    labels: torch.Tensor


BATCHES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "mapping": Frozen,
    "tuple": lambda batch: tuple(batch.values()),
    "list": lambda batch: list(batch.values()),
    "mapping in a dict": lambda batch: {"inner": Frozen(batch)},
    "record in a dict": lambda batch: {"inner": Record(**batch)},
}


class WritesAnyBatch(Trainer):
    """Writes into the tensors of its batch, and changes the batch where it can be changed."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        batch = inputs["inner"] if isinstance(inputs, Mapping) and "inner" in inputs else inputs
        if isinstance(batch, Mapping):
            batch = batch["x"], batch["labels"]
        x, labels = batch if isinstance(batch, list | tuple) else (batch.x, batch.labels)
        x += 1.0
        if isinstance(batch, list):
            batch[0] = 2 * x
        if isinstance(batch, Record):
            batch.x = 2 * x
        return model(x, labels)["loss"]


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_of_any_class_that_trainer_takes_is_as_a_dict(kind: str, tmp_path: Path) -> None:
    projected = []
    for make in (dict, BATCHES[kind]):
        trainer = table_trainer(WritesAnyBatch, tmp_path)
        trainer.data_collator = lambda rows, make=make: make(default_data_collator(rows))
        trainer.train()
        projected.append(logged(trainer, "zo/projected_grad"))
    assert projected[0] == projected[1]


@pytest.mark.parametrize(
    ("make", "kind", "told"),
    [
        (
            lambda batch: Pair(**batch),
            WritesAnyBatch,
            r"^Trainer makes every dict, [^.]* \(Pair\..*; let data_collator return",
        ),
        (
            lambda batch: OfTwo(batch, 2),
            WritesAnyBatch,
            r"^Trainer makes every dict, [^.]* \(OfTwo\..*; let data_collator",
        ),
        (lambda batch: Record(**batch), WritesAnyBatch, r"^data_collator returns a Record, [^.]*; return a dict\.$"),
        (
            BATCHES["tuple"],
            Trainer,
            r"^data_collator returns a tuple, [^.]*; return a dict, or override compute_loss\.$",
        ),
    ],
)
def test_a_batch_that_trainer_does_not_take_is_refused(
    make: Callable[[dict[str, torch.Tensor]], Any], kind: type[Trainer], told: str, tmp_path: Path
) -> None:
    trainer = table_trainer(kind, tmp_path)
    trainer.data_collator = lambda rows: make(default_data_collator(rows))
    with pytest.raises(ValueError, match=told):
        trainer.train()
