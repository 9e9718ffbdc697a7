"""A direction for every row, for every method of PEFT: each row's number is that of the row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from tests.subspaces.helpers import loss_of
from tests.subspaces.peft.methods import METHODS, Method, every_method
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe

ROWS = 4


@every_method(only_common_by_default=True)
def test_each_row_has_the_number_of_its_own_loss(method: Method) -> None:
    model: Any = method.model()
    rows = [method.task()[i] for i in range(ROWS)]
    batch = default_collate([{key: torch.as_tensor(value) for key, value in row.items()} for row in rows])
    zo = ZerothOrder(model, "adapter", seed=0, rows_per_direction=1)
    loss = loss_of(model, batch)
    found = zo.estimate(loss).projected_gradients
    assert zo.row_groups is not None and zo.row_groups.comes_apart == method.batchable
    if not method.batchable:
        assert len(found) == 1
        return
    eps, labels = zo.estimator.eps, batch["labels"][:, 1:] != -100
    expected = []
    for row in range(ROWS):
        part = {key: value[row : row + 1] for key, value in batch.items()}
        ends = []
        for scale in (eps, -eps):
            with torch.no_grad(), zo.subspace.at((Probe(row, scale),), zo._stream, zo.distribution):
                ends.append(model(**part).loss.double().item())
        expected.append((ends[0] - ends[1]) / (2 * eps) * float(labels[row].sum() / labels.sum()))
    assert found == pytest.approx(expected, abs=3e-6 / eps, rel=1e-3)


@pytest.mark.parametrize(
    "name", ["lora", "lora with biases", "lora with modules to save", "dora", "boft", "ia3", "vera"]
)
def test_auto_takes_a_direction_for_every_row_where_modules_take_all_groups_in_one_call(name: str) -> None:
    zo = ZerothOrder(METHODS[name].model(), "adapter", rows_per_direction="auto")
    assert zo.settings.rows_per_direction == int(name.startswith("lora"))
