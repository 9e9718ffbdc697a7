"""The recipe that compares ways to make an estimate from the same directions, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

EPS = 1e-2
ONES = [EPS] * 4


@pytest.fixture
def batch(recipe: ModuleType, model_folder: str) -> object:
    task = recipe.Task(model_folder, "vocabulary", "low_rank", 0)
    zo, _ = recipe.engine(task.model(), "low_rank", 0, 1, 0, 1e-3)
    return recipe.Batch(zo, task.loss(zo.model, task.draw(4)), 4)


def test_a_rows_loss_is_that_at_its_own_direction(batch: object) -> None:
    losses, z = batch.at(7, ONES)
    assert len({tuple(row.tolist()) for row in z}) == 4
    others, again = batch.at(7, [EPS, 0.0, 0.0, 0.0])
    assert torch.equal(z, again)
    assert losses[0].item() == pytest.approx(others[0].item(), abs=1e-6)
    assert others[1:].tolist() == pytest.approx(batch.clean[1:].tolist(), abs=1e-6)
    moved = (losses - batch.clean).abs()
    assert moved.min() > 1e-5, "every row has moved"


def test_two_sided_pairs_do_not_change_if_a_row_takes_the_opposite_sign(batch: object) -> None:
    ends = {}
    for name, signs in (("equal", [1, 1, 1, 1]), ("opposite", [1, -1, 1, -1])):
        plus, z = batch.at(7, [EPS * sign for sign in signs], shared=2)
        minus, _ = batch.at(7, [-EPS * sign for sign in signs], shared=2)
        ends[name] = (plus - minus) * torch.tensor(signs) / (2 * EPS) @ z
    assert torch.equal(z[0], z[1]) and not torch.equal(z[1], z[2])
    assert torch.allclose(ends["equal"], ends["opposite"], atol=1e-5)


def test_every_way_has_the_gradient_as_its_mean(recipe: ModuleType, batch: object) -> None:
    """But for those that leave the batch's losses in, whose noise hides it: these have the slope of each draw."""
    totals: dict[str, float] = {}
    square, draws = batch.gradient.square().sum(), 60
    for step in range(draws):
        for name, estimate in recipe.estimates(batch, step, EPS).items():
            totals[name] = totals.get(name, 0.0) + (estimate @ batch.gradient / square).item() / draws
    assert len(totals) == 9
    for name, mean in totals.items():
        if "own clean loss" in name or "two-sided" in name:
            assert mean == pytest.approx(1, abs=0.4), name


def test_the_table_has_every_way_at_both_points(recipe: ModuleType, model_folder: str, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    command = f"--model {model_folder} --batch-size 4 --steps 1 --batches 1 --draws 1 --seeds 0 1 --eps 1e-2"
    recipe.main([*command.split(), "--output", str(table)])
    lines = [line.split(" | ") for line in table.read_text().splitlines()[2:]]
    assert [line[0] for line in lines] == ["| 0"] * 9 + ["| 1"] * 9
    assert all(line[-1] == "1 ± 0 |" for line in lines if line[2] == "two-sided")
