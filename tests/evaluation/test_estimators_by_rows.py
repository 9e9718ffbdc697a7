"""Estimators with a direction for every group of rows: their numbers, and what the estimate is in the mean."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from tests.conftest import assert_same_bits, causal_batch, seeded, tiny_gpt2, tiny_llama, tiny_opt, weights_of
from tests.evaluation.test_rows import OPTIONS, ROWS, SUBSPACES, bert, ragged, share_of, with_labels
from tests.subspaces.helpers import direction, loss_of, move_off_the_origin, prepared, sgd
from tests.trainer.runs import InOrder, SaveAt, logged, make_trainer
from zo_hf.directions import GivenMask
from zo_hf.engine import ZerothOrder
from zo_hf.estimators import ESTIMATORS
from zo_hf.evaluation.by_rows import BY_ROWS
from zo_hf.subspaces import SUBSPACES as KINDS
from zo_hf.subspaces import LowRank
from zo_hf.subspaces.full_in_memory import FullInMemory
from zo_hf.trajectory import replay

SLOPES = [name for name in BY_ROWS["estimator"] if not ESTIMATORS[name].is_scale_free]
TWO = {"zo_num_directions": 2}
EVERY_ESTIMATOR = pytest.mark.parametrize("estimator", BY_ROWS["estimator"])


def eager(build: Any) -> nn.Module:
    return seeded(build, attn_implementation="eager")


# With the number of rows that share a direction.
MODELS = {
    "opt": (tiny_opt, causal_batch(ROWS), 2),
    "llama, ragged": (tiny_llama, ragged(), 1),
    "gpt2": (tiny_gpt2, causal_batch(ROWS), 3),
    "classes": (partial(bert, BertForSequenceClassification), with_labels(torch.arange(ROWS) % 3), 2),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_one_pass_gives_the_exact_derivative_of_every_group(subspace: str, name: str) -> None:
    build, batch, rows_per_direction = MODELS[name]
    model = prepared(subspace, eager(build))
    options = {"estimator": "forward_gradient", "rows_per_direction": rows_per_direction, "num_directions": 2}
    zo = ZerothOrder(model, KINDS[subspace](model, seed=3), seed=3, **options)
    move_off_the_origin(zo.subspace)
    loss, calls, before = loss_of(model, batch), [], weights_of(model)
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    found = zo.estimate(loss).projected_gradients
    handle.remove()
    assert zo.row_groups is not None and zo.row_groups.comes_apart
    assert len(calls) == 2 + 3 and zo.forward_passes == 2 * len(calls)  # the first batch is looked at three times more
    assert_same_bits(weights_of(model), before)
    expected = []
    for group in range(ROWS // rows_per_direction):
        with zo.subspace.differentiable() as leaves:
            share = share_of(model, batch, slice(group * rows_per_direction, (group + 1) * rows_per_direction))
            parts = torch.autograd.grad(share, leaves, allow_unused=True)
        gradient = {n: part for n, part in zip(zo.subspace.coordinates, parts, strict=True) if part is not None}
        for index in (2 * group, 2 * group + 1):
            z = direction(zo.subspace, index=index)
            expected.append(float(sum((gradient[key].double() * z[key].double()).sum() for key in gradient)))
    assert found == pytest.approx(expected, abs=1e-4 * max(map(abs, expected)))


class Bowl:
    """A loss of four rows that are unlike, float64.

    Args:
        offset: added to the last row's loss.
        couples: lets rows see the mean of the batch.
    """

    rows = 4

    def __init__(self, offset: float = 0.0, couples: bool = False) -> None:
        def layers() -> nn.Module:
            return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))

        self.layers, self.couples = seeded(layers, torch.float64), couples
        generator = torch.Generator().manual_seed(2)
        self.x = torch.randn(self.rows, 3, generator=generator, dtype=torch.float64)
        self.y = torch.tensor([0.3, -4.0, 1.0, 2.0], dtype=torch.float64)
        self.offset = torch.tensor([0.0, 0.0, 0.0, offset], dtype=torch.float64)

    def __call__(self) -> Tensor:
        return self.by_groups(1)[0]

    def by_groups(self, groups: int) -> Tensor:
        """(groups,)"""
        found = self.layers(self.x)[:, 0]
        away = found - (found.mean() if self.couples else self.y)
        return (away.square() + self.offset).view(groups, -1).sum(1)


def engine(loss: Bowl, estimator: str, num_directions: int = 1, rows: int = 2, **options: Any) -> ZerothOrder:
    """All weights move, densely."""
    options |= {"estimator": estimator, "num_directions": num_directions, "rows_per_direction": rows, "eps": 1e-4}
    return ZerothOrder(loss.layers, LowRank(loss.layers, 8, 0, seed=3), seed=3, **options)


def numbers_of(loss: Bowl, estimator: str, num_directions: int) -> Tensor:
    """c of two groups of rows, (2, num_directions)."""
    zo = engine(loss, estimator, num_directions)
    found = zo.estimate(loss).projected_gradients
    zo.subspace.detach()
    return torch.tensor(found, dtype=torch.float64).view(2, -1)


def directions(zo: ZerothOrder, count: int, step: int = 0) -> Tensor:
    """(count, d)"""
    drawn = [direction(zo.subspace, step, index) for index in range(count)]
    return torch.stack([torch.cat([part.flatten() for part in parts.values()]) for parts in drawn])


def gradients(zo: ZerothOrder, shares: Callable[[], Tensor]) -> Tensor:
    """Autograd's gradient of every share, (groups, d)."""
    with zo.subspace.differentiable() as leaves:
        each = [torch.autograd.grad(share, leaves, retain_graph=True) for share in shares()]
    return torch.stack([torch.cat([part.flatten() for part in parts]) for parts in each])


def test_rows_that_see_one_another_share_their_tangent() -> None:
    """Though the shares at the point itself, where no row has moved, are the same."""
    loss = Bowl(couples=True)
    found = []
    for rows in (1, 0):
        zo = engine(loss, "forward_gradient", rows=rows)
        found.append(zo.estimate(loss).projected_gradients)
        assert zo.row_groups is None or not zo.row_groups.comes_apart
        zo.subspace.detach()
    assert len(found[0]) == 1 and found[0] == found[1]


def test_a_batch_that_does_not_come_apart_keeps_its_derivative() -> None:
    """It moves along the first direction, in a run whose other batches come apart."""
    loss = Bowl()
    zo = engine(loss, "forward_gradient")
    each = gradients(zo, lambda: loss.by_groups(2))
    z = directions(zo, 2)
    assert zo.estimate(loss).projected_gradients == pytest.approx((each * z).sum(1).tolist())
    together = zo.estimate(lambda: loss()).projected_gradients
    assert together == pytest.approx([float(each.sum(0) @ z[0]), 0.0])


@pytest.mark.parametrize("estimator", SLOPES)
def test_the_mean_estimate_is_the_gradient_and_its_square_is_as_derived(estimator: str) -> None:
    """E[ĝ] = ∇L, and E‖ĝ‖² = Σ_g (d + 2)‖∇ℓ_g‖² + Σ_{g≠h} ∇ℓ_g·∇ℓ_h for Gaussian directions."""
    loss, q = Bowl(), 60
    zo = engine(loss, estimator, q)
    numbers = torch.tensor(zo.estimate(loss).projected_gradients, dtype=torch.float64)
    samples = (numbers[:, None] * directions(zo, 2 * q)).view(2, q, -1).sum(0)
    each = gradients(zo, lambda: loss.by_groups(2))
    student = (samples.mean(0) - each.sum(0)) / (samples.std(0) / q**0.5)
    assert student.abs().max() < 4.5
    second = (zo.subspace.dimension + 1) * each.square().sum() + each.sum(0).square().sum()
    squares = samples.square().sum(1)
    assert abs(squares.mean() - second) < 4 * squares.std() / q**0.5


@pytest.mark.parametrize("kind", [*BY_ROWS["direction"], "given_mask"])
def test_the_mean_along_any_directions_is_the_gradient_of_what_they_move(kind: str) -> None:
    """E[ĝ] = m ⊙ ∇L, with the mask m of the step: all coordinates for most, the small weights, or the layers chosen."""
    loss, q = Bowl(), 60
    subspace = FullInMemory(loss.layers, seed=3)
    masks = {name: torch.arange(p.numel()).view(p.shape) % 2 == 0 for name, p in subspace.coordinates.items()}
    own = GivenMask(subspace.direction_context(), masks) if kind == "given_mask" else kind
    more = {"active_layers": 0.5} if kind == "layers" else {}
    options: dict[str, Any] = {"eps": 1e-4, "num_directions": q, "rows_per_direction": 2} | more
    zo = ZerothOrder(loss.layers, subspace, direction=own, seed=3, **options)
    numbers = torch.tensor(zo.estimate(loss).projected_gradients, dtype=torch.float64)
    assert zo.row_groups is not None and zo.row_groups.comes_apart and len(numbers) == 2 * q
    parts = {name: p.detach().flatten() for name, p in subspace.coordinates.items()}
    z = torch.stack(
        [
            torch.cat([zo.distribution.draw_slice(zo._stream(i), name, 0, values) for name, values in parts.items()])
            for i in range(2 * q)
        ]
    ).double()
    moves = z.ne(0).any(0)
    assert moves.all() == (kind in ("gaussian", "rademacher", "sphere")) and moves.any()
    expected = gradients(zo, lambda: loss.by_groups(2)).sum(0)
    samples = (numbers[:, None] * z).view(2, q, -1).sum(0)[:, moves]
    assert ((samples.mean(0) - expected[moves]) / (samples.std(0) / q**0.5)).abs().max() < 4.5


def test_every_group_has_the_curvature_of_its_own_share() -> None:
    """A step records c of all groups and then zᵀ∇²ℓ_g z of all groups; the gradient is made of c alone."""
    loss, q, recorded = Bowl(), 3, []
    zo = engine(loss, "second_difference", q)
    zo.on_step = lambda step: recorded.extend(step.projected_gradients)
    optimizer = sgd(zo, 0.0)
    slopes = zo.estimate(loss).projected_gradients
    z = directions(zo, 2 * q)
    found = torch.cat([p.grad.flatten() for p in zo.subspace.coordinates.values()])
    torch.testing.assert_close(found, torch.tensor(slopes, dtype=torch.float64) @ z / q)
    optimizer.step()
    expected = []
    for index in range(2 * q):
        with zo.subspace.differentiable() as leaves:
            share = loss.by_groups(2)[index // q]
            parts = torch.autograd.grad(share, leaves, create_graph=True)
            slope = torch.cat([part.flatten() for part in parts]) @ z[index]
            products = torch.autograd.grad(slope, leaves)
        expected.append(float(torch.cat([part.flatten() for part in products]) @ z[index]))
    assert recorded[: 2 * q] == list(slopes)
    assert recorded[2 * q :] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_hizoo_adds_up_curvatures_before_their_absolute_value() -> None:
    """h ← (1-s)·h + s·½·|Σ_g κ_g·z_g²|·h, and the step is along z/√h with the h before."""
    loss, rate, recorded = Bowl(), 0.3, []
    zo = engine(loss, "second_difference", rule="curvature", curvature_rate=rate)
    zo.on_step = lambda step: recorded.append(step.projected_gradients)
    optimizer, h = sgd(zo, 0.0), torch.ones(zo.subspace.dimension, dtype=torch.float64)
    for step in range(3):
        slopes = zo.estimate(loss).projected_gradients
        z = directions(zo, 2, step)
        found = torch.cat([p.grad.flatten() for p in zo.subspace.coordinates.values()])
        torch.testing.assert_close(found, torch.tensor(slopes, dtype=torch.float64) @ (z / h.sqrt()))
        optimizer.step()
        total = torch.tensor(recorded[step][2:], dtype=torch.float64) @ z.square()
        h = (1 - rate) * h + rate * 0.5 * total.abs() * h
        state = zo.rule.state()
        torch.testing.assert_close(torch.cat([state[name].flatten() for name in zo.subspace.coordinates]), h)


@pytest.mark.parametrize("estimator", ["two_point", "one_sided", "forward_gradient"])
def test_svrg_subtracts_what_every_group_has_at_the_snapshot(estimator: str) -> None:
    """ĝ = Σ_g 1/q Σᵢ (c - c̃)·z + g̃, with c and c̃ of the group's share, and g̃ of two steps at the snapshot."""
    loss, q, recorded = Bowl(), 2, []
    zo = engine(loss, estimator, q, rule="svrg", svrg_batches=2, svrg_steps=2)
    zo.on_step = lambda step: recorded.append(step.projected_gradients)
    optimizer, coordinates = sgd(zo, 2e-2), list(zo.subspace.coordinates.values())
    snapshot, anchor = [], torch.zeros(zo.subspace.dimension, dtype=torch.float64)

    def numbers(at: list[Tensor], z: Tensor) -> Tensor:
        """c of every direction at a point, from autograd."""
        now = [p.detach().clone() for p in coordinates]
        torch._foreach_copy_(now_data, at)
        each = gradients(zo, lambda: loss.by_groups(2)).repeat_interleave(q, 0)
        torch._foreach_copy_(now_data, now)
        return (each * z).sum(1)

    now_data = [p.data for p in coordinates]
    for step in range(8):
        z, looks_back = directions(zo, 2 * q, step), step % 4 >= 2
        if step % 4 == 0:
            snapshot, anchor = [p.detach().clone() for p in coordinates], torch.zeros_like(anchor)
        here, there = numbers(now_data, z), numbers(snapshot, z)
        anchor = anchor if looks_back else anchor + there @ z / q / 2
        zo.estimate(loss)
        if step % 4 == 0:
            assert all(p.grad is None for p in coordinates)
        else:
            found = torch.cat([p.grad.flatten() for p in coordinates])
            torch.testing.assert_close(found, (here - there) @ z / q + anchor, rtol=1e-2, atol=1e-2)
            assert not looks_back or (here - there).norm() > 0.1
        optimizer.step()
        both = torch.tensor(recorded[-1], dtype=torch.float64)
        torch.testing.assert_close(both, torch.cat([here, there]), rtol=1e-2, atol=1e-2)


def test_all_groups_share_one_deviation() -> None:
    """So their numbers are differences in one unit: Σ_g of the variances within the groups is 1 in it."""
    loss, q = Bowl(), 4
    one_sided, two_point = (numbers_of(loss, estimator, q) for estimator in ("one_sided", "two_point"))
    fzoo = one_sided / one_sided.var(1, correction=1).sum().sqrt() / 1e-4
    torch.testing.assert_close(numbers_of(loss, "fzoo", q), fzoo, rtol=1e-6, atol=0)
    evolution = two_point / two_point.square().mean(1).sum().sqrt()
    torch.testing.assert_close(numbers_of(loss, "evolution", q), evolution, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("estimator", ["fzoo", "evolution"])
def test_a_hard_row_is_not_compared_with_an_easy_one(estimator: str) -> None:
    found = [numbers_of(Bowl(offset), estimator, 3) for offset in (0.0, 100.0)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


# Runs.


@pytest.mark.parametrize(
    ("option", "name"),
    [(option, name) for option in ("estimator", "rule", "direction") for name in BY_ROWS[option][1:]],
)
def test_runs_resume_and_replay_with_the_same_bits(tmp_path: Path, option: str, name: str) -> None:
    options = OPTIONS | TWO | {"per_device_train_batch_size": 4, f"zo_{option}": name}
    options |= {"zo_estimator": "second_difference"} if name == "curvature" else {}
    options |= {"zo_subspace": "full", "zo_rank": None, "zo_fold_steps": None} if name == "sparse" else {}
    options |= {"zo_svrg_batches": 1, "max_steps": 5} if name == "svrg" else {}  # as long as a fold
    whole = make_trainer(tmp_path, eager(tiny_opt), more={"callbacks": [SaveAt(3)]}, **options)
    whole.train()
    assert_same_bits(weights_of(replay(eager(tiny_opt), tmp_path)), weights_of(whole.model))
    resumed = make_trainer(tmp_path, eager(tiny_opt), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))


@EVERY_ESTIMATOR
def test_micro_batches_give_the_same_numbers(tmp_path: Path, estimator: str) -> None:
    found = []
    for rows, micro_batches in ((8, 1), (2, 4)):
        options = OPTIONS | TWO | {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches}
        options |= {"zo_estimator": estimator, "max_steps": 2, "learning_rate": 1e-3}
        trainer = make_trainer(tmp_path / str(rows), eager(tiny_opt), kind=InOrder, **options)
        trainer.train()
        found.append(logged(trainer, "zo/projected_grad") + logged(trainer, "loss"))
    assert found[0] == pytest.approx(found[1], rel=1e-2, abs=1e-4)
