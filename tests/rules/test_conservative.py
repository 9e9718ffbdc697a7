"""ZO-SGD-Cons: the best of staying, stepping and stepping back."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import TinyTask, assert_same_bits, seeded, tiny_opt, weights_of
from tests.rules.helpers import Quadratic, engine, gradients, linear_task
from tests.trainer.runs import trained
from zo_hf.evaluation.row_losses import RowLosses
from zo_hf.parallel.ranks import Grid, Ranks
from zo_hf.trajectory import read_trajectory


def choices(zo) -> list[float]:
    """Filled with the choice of every step from here on."""
    made: list[float] = []
    zo.on_step = lambda step: made.append(step.projected_gradients[-1])
    return made


@pytest.mark.parametrize(
    ("lr", "estimator", "choice_made"),
    [(1e-3, "two_point", 1.0), (0.3, "two_point", 1.0), (0.3, "second_difference", 0.0), (30.0, "two_point", 0.0)],
)
def test_the_loss_on_the_batch_never_rises(lr: float, estimator: str, choice_made: float) -> None:
    """Each step is the best of three losses that are computed here, at points that are written here."""
    model, loss = linear_task()
    zo, optimizer = engine(
        model, "conservative", lr, estimator=estimator, num_directions=2, batched_probes=False, fold_steps=0
    )
    plain, _ = engine(linear_task()[0], "none", lr, num_directions=2, fold_steps=0)
    made = choices(zo)
    for step in range(12):
        start = {name: c.detach().clone() for name, c in zo.subspace.coordinates.items()}
        before = loss().item()
        estimate = zo.estimate(loss)
        plain.step = step
        plain.apply(estimate.projected_gradients, skipped=False)
        optimizer.step()
        after = loss().item()
        reached = {}
        end = {name: c.detach().clone() for name, c in zo.subspace.coordinates.items()}
        for choice in (0.0, 1.0, -1.0):
            with torch.no_grad():
                for name, c in zo.subspace.coordinates.items():
                    c.copy_(start[name] - choice * lr * gradients(plain)[name])
            zo.subspace.coordinates_changed()
            reached[choice] = loss().item()
        with torch.no_grad():
            for name, c in zo.subspace.coordinates.items():
                c.copy_(end[name])
        zo.subspace.coordinates_changed()
        assert after <= before
        assert after == pytest.approx(reached[made[-1]], rel=1e-4)
        assert after <= min(reached.values()) * (1 + 1e-4)
    assert choice_made in made


@pytest.mark.parametrize("estimator", ["two_point", "one_sided"])
def test_with_a_direction_for_every_row_the_loss_of_the_batch_chooses(estimator: str) -> None:
    """The step is the best of three points that are written here, in micro-batches."""
    model = seeded(lambda: torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)), torch.float64)  # fmt: skip
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = ((x[:4], 1 / 2), (x[4:], 1 / 2))

    def losses(part: Tensor) -> RowLosses:
        return RowLosses((model(part)[:, 0] - 1).square())

    def loss() -> float:
        return float(sum(weight * losses(part).detach().mean() for part, weight in parts))

    zo, optimizer = engine(
        model, "conservative", lr := 0.4, estimator=estimator, num_directions=1, rows_per_direction=1, fold_steps=0
    )
    made = choices(zo)
    for _ in range(12):
        start, before = {name: c.detach().clone() for name, c in zo.subspace.coordinates.items()}, loss()
        for part, weight in parts:
            zo.probe(lambda part=part: losses(part), weight=weight)
        zo.finish_estimate()
        step = {name: c.grad.clone() for name, c in zo.subspace.coordinates.items()}
        optimizer.step()
        reached = {made[-1]: loss()}
        assert zo.row_groups is not None and zo.row_groups.comes_apart and zo.groups == 8
        if made[-1]:
            for choice in (0.0, 1.0, -1.0):
                with torch.no_grad():
                    for name, c in zo.subspace.coordinates.items():
                        c.copy_(start[name] - choice * made[-1] * lr * step[name])
                zo.subspace.coordinates_changed()
                reached[choice] = loss()
            assert reached[made[-1]] == min(reached.values()) <= before
            with torch.no_grad():
                for name, c in zo.subspace.coordinates.items():
                    c.copy_(start[name] - lr * step[name])
            zo.subspace.coordinates_changed()
    assert {0.0, 1.0} <= set(made)


class Noting(Quadratic):
    """Keeps every point at which it was evaluated."""

    def __init__(self) -> None:
        super().__init__(torch.linspace(1.0, 9.0, 7))
        self.seen: list[Tensor] = []

    def forward(self) -> Tensor:
        self.seen.append(self.x.detach().clone())
        return super().forward()


def test_the_candidates_are_evaluated_at_the_bits_that_the_optimizer_writes() -> None:
    model = Noting()
    zo, optimizer = engine(model, "conservative", 1e-2, num_directions=3, batched_probes=False)
    made = choices(zo)
    for _ in range(6):
        model.seen.clear()
        zo.estimate(model)
        optimizer.step()
        model()
        at = dict(zip((0.0, 1.0, -1.0), model.seen[6:9], strict=True))
        assert torch.equal(model.seen[9], at[made[-1]])
    assert {1.0, -1.0} & set(made)


@pytest.mark.parametrize(("estimator", "expected"), [("two_point", 2 * 3 + 3), ("second_difference", 2 * 3 + 1 + 2)])
def test_a_step_costs_three_passes_more_or_two_beside_a_clean_loss(estimator: str, expected: int) -> None:
    model, loss = linear_task()
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return loss()

    zo, _ = engine(model, "conservative", num_directions=3, estimator=estimator, batched_probes=False)
    zo.estimate(closure)
    assert calls == zo.forward_passes == zo.forward_passes_per_step == expected


def test_a_tie_and_what_is_no_number_stay() -> None:
    rule = engine(linear_task()[0], "conservative")[0].rule
    assert rule.choose([1.0, 1.0, 1.0]) == 0.0
    assert rule.choose([1.0, 0.5, 0.5]) == 1.0
    assert rule.choose([1.0, math.nan, 0.9]) == -1.0
    assert rule.choose([1.0, math.inf, math.nan]) == 0.0
    assert rule.choose([math.nan, math.nan, math.nan]) == 0.0


def test_the_choice_is_made_on_all_micro_batches() -> None:
    """Two halves with weight ½ choose, and end, as the whole does."""
    ends = []
    for parts in (1, 2):
        model = seeded(lambda: torch.nn.Linear(5, 4), torch.float64)
        x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        zo, optimizer = engine(model, "conservative", 0.5, num_directions=2)
        made = choices(zo)
        for _ in range(10):
            for part in x.chunk(parts):
                zo.probe(lambda part=part, model=model: model(part).square().mean(), weight=1 / parts)
            zo.finish_estimate()
            optimizer.step()
        zo.finish()
        ends.append((made, weights_of(model)))
    assert ends[0][0] == ends[1][0] and len(set(made)) > 1
    torch.testing.assert_close(ends[1][1]["weight"], ends[0][1]["weight"])


def test_ranks_choose_by_the_mean_of_their_losses() -> None:
    """The other rank finds the opposite losses, only larger: it is what decides."""

    class Opposed(Ranks):
        def all_gather(self, tensor: Tensor) -> Tensor:
            return torch.stack([tensor, -3 * tensor])

    model, loss = linear_task()
    zo, optimizer = engine(model, "conservative", 0.05, num_directions=2, ranks=Opposed(Grid(data=2)))
    made = choices(zo)
    before = loss().item()
    for _ in range(8):
        zo.estimate(loss)
        optimizer.step()
    zo.finish()
    assert set(made) != {0.0} and loss().item() > before


@pytest.mark.parametrize(("directions", "own"), [(2, 4 + 1), (4, 2 + 0)])
def test_ranks_that_share_a_batch_share_the_candidates(directions: int, own: int) -> None:
    """Each pass is counted once, also where a rank has no candidate to evaluate."""
    model, loss = linear_task()
    ranks = _Replies(Grid(1, directions, 0))
    zo, _ = engine(model, "conservative", 0.3, num_directions=4, ranks=ranks, batched_probes=False)
    made = 0

    def closure() -> Tensor:
        nonlocal made
        made += 1
        return loss()

    zo.estimate(closure)
    assert made == own and zo.forward_passes == 2 * 4 + 3
    zo.load_state_dict(zo.state_dict())
    assert zo.forward_passes == 11


class _Replies(Ranks):
    """The other ranks find what this one does, or nothing where it has fewer probes than they."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor] * self.grid.world_size)


def test_the_log_has_one_number_more(tmp_path: Path) -> None:
    options = {"zo_rule": "conservative", "zo_num_directions": 2, "learning_rate": 1e-2}
    trainer = trained(tmp_path, seeded(tiny_opt), more={"train_dataset": TinyTask()}, **options)
    trajectory = read_trajectory(tmp_path)
    assert trajectory.header["directions"] == 3
    assert all(record.projected_gradients[2] in (0.0, 1.0, -1.0) for record in trajectory.records)
    means = [sum(record.projected_gradients[:2]) / 2 for record in trajectory.records]
    assert means == [entry["zo/projected_grad"] for entry in trainer.state.log_history if "loss" in entry]


def test_staying_leaves_the_bits_alone() -> None:
    model, loss = linear_task()
    zo, optimizer = engine(model, "conservative", 1e4)
    made = choices(zo)
    before = {name: c.detach().clone() for name, c in zo.subspace.coordinates.items()}
    zo.estimate(loss)
    optimizer.step()
    assert made == [0.0]
    assert_same_bits({name: c.detach().clone() for name, c in zo.subspace.coordinates.items()}, before)
