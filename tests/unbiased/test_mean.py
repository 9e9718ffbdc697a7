"""The mean over directions is autograd's gradient, whatever the loss and whatever moves.

Every loss that comes apart by rows, in every subspace, through the Trainer: a step along a complete set of directions,
whose estimate is an expectation, see `complete`.
"""

from __future__ import annotations

import copy
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import TrainerCallback

from tests.conftest import assert_same_bits, seeded
from tests.parallel.launch import run
from tests.subspaces.helpers import gradient_in_coordinates, plain
from tests.trainer.runs import config
from tests.unbiased.complete import Complete
from tests.unbiased.losses import LOSSES, Loss
from tests.unbiased.spaces import SPACES, Space
from zo_hf.directions import DISTRIBUTIONS
from zo_hf.engine import ZerothOrder
from zo_hf.subspaces import SUBSPACES

RATE, EPS = 1.0, 2e-3


class Moved(TrainerCallback):
    """Notes how far the coordinates move in the first step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = {name: c.detach().clone() for name, c in self.trainer.zo.subspace.coordinates.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        coordinates = self.trainer.zo.subspace.coordinates
        self.gradient = {name: (self.before[name] - c.detach()) / RATE for name, c in coordinates.items()}
        self.groups = self.trainer.zo.groups


def estimated(
    folder: Path, model: nn.Module, loss: Loss, space: Space, rows_per_direction: int = 1, processes: int = 1
) -> Moved:
    """The change of a Trainer's step along a complete set of directions."""
    micro = len(loss.rows) // loss.micro_batches // processes
    options = {f"zo_{name}": value for name, value in space.options.items()} | dict(loss.options)
    args = config(
        folder,
        max_steps=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=loss.micro_batches,
        max_grad_norm=0.0,
        zo_max_projected_grad=0.0,
        zo_rows_per_direction=rows_per_direction,
        zo_direction="complete",
        zo_num_directions=space.directions,
        zo_eps=EPS,
        zo_fold_steps=None,
        optim="sgd",
        seed=0,
        **options,
    )
    moved = Moved()
    more = {"train_dataset": loss.rows, "data_collator": loss.collator, **loss.trainer}
    moved.trainer = loss.kind(model, args, callbacks=[moved], **more)
    moved.trainer.train()
    return moved


def differentiated(model: nn.Module, loss: Loss, space: Space) -> dict[str, Tensor]:
    """Autograd's gradient of the loss of all rows in one batch, in the same coordinates."""
    zo = ZerothOrder(model, **dict(space.options), seed=0)
    zo.subspace.detach()
    reference = plain(model) if space.options["subspace"] == "scales" else model
    for module in reference.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # of which torch returns no gradient, even where the loss depends on it
    batch = loss.collator(loss.rows)

    def value(parameters: dict[str, Tensor]) -> Tensor:
        # DoRA takes the norm of its weights for a constant, and a probe does not.
        with mock.patch.object(Tensor, "detach", lambda tensor: tensor):
            return loss.whole(lambda **inputs: functional_call(reference, parameters, kwargs=inputs), batch)

    return gradient_in_coordinates(zo.subspace, value)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to ε² and rounding."""
    assert found.keys() == expected.keys()
    one, other = (torch.cat([tensors[name].flatten() for name in expected]) for tensors in (found, expected))
    assert other.norm() > 1e-3
    assert torch.cosine_similarity(one, other, dim=0) > 0.9999
    assert (one - other).norm() < 0.01 * other.norm()


def check(folder: Path, loss: Loss, space: Space, rows_per_direction: int = 1) -> None:
    model = space.prepare(seeded(loss.build), loss)
    expected = differentiated(copy.deepcopy(model), loss, space)
    moved = estimated(folder, model, loss, space, rows_per_direction)
    assert_same(moved.gradient, expected)
    assert moved.groups == (max(1, loss.groups // rows_per_direction) if rows_per_direction else 1)


@pytest.fixture(autouse=True)
def complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DISTRIBUTIONS, Complete.name, Complete)


CASES = [
    (name, other)
    for name, loss in LOSSES.items()
    for other, space in SPACES.items()
    if other not in loss.without and not (space.has_tasks and loss.task is None)
]
# Every loss in one subspace, and every subspace with one loss of tokens and one of rows.
QUICK = ("low_rank",), ("causal", "classes")


def cases() -> list[Any]:
    slow = [loss not in QUICK[1] and space not in QUICK[0] for loss, space in CASES]
    return [pytest.param(*case, marks=[pytest.mark.slow] * is_slow) for case, is_slow in zip(CASES, slow, strict=True)]


@pytest.mark.parametrize(("loss", "space"), cases())
def test_it_is_the_gradient(loss: str, space: str, tmp_path: Path) -> None:
    check(tmp_path, LOSSES[loss], SPACES[space])


@pytest.mark.parametrize("rows_per_direction", [0, 2])
@pytest.mark.parametrize("loss", ["causal, accumulated", "classes", "packed", "smoothed"])
def test_so_it_is_where_rows_share_directions(loss: str, rows_per_direction: int, tmp_path: Path) -> None:
    check(tmp_path, LOSSES[loss], SPACES["low_rank"], rows_per_direction)


def test_the_tables_are_complete() -> None:
    assert {space.options["subspace"] for space in SPACES.values()} == set(SUBSPACES)


# Two processes, with unequal numbers of labels.

SHARED = ["causal", "masked", "translation", "function, sum", "packed", "marked rows"]


def main() -> None:
    """The work of each of the launched processes."""
    DISTRIBUTIONS[Complete.name] = Complete
    for name in SHARED:
        loss = replace(LOSSES[name], micro_batches=1)
        folder = Path(sys.argv[1]) / name
        moved = estimated(folder, seeded(loss.build), loss, SPACES["low_rank"], processes=2)
        torch.save((moved.gradient, moved.groups), Path(sys.argv[1]) / f"{name}-{os.environ['RANK']}.pt")


@pytest.mark.slow
def test_so_it_is_on_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text("from tests.unbiased.test_mean import main\n\nmain()\n")
    run(script, 2, tmp_path)
    for name in SHARED:
        loss, (first, second) = LOSSES[name], (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        assert_same(first[0], differentiated(seeded(loss.build), loss, SPACES["low_rank"]))
        assert_same_bits(first[0], second[0])
        assert first[1] == second[1] == loss.groups
