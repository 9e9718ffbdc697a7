"""A snapshot and the gradient there: the recursion, what drops out of it, and when a run pays what."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import assert_same_bits, seeded, tiny_opt, weights_of
from tests.rules.helpers import engine, linear_task
from tests.trainer.runs import SaveAt, logged, trained
from zo_hf.directions import GAUSSIAN, unit_vectors
from zo_hf.engine import ZerothOrder
from zo_hf.estimators import ESTIMATORS
from zo_hf.rng import Stream, draw_slice
from zo_hf.subspaces import LowRank
from zo_hf.trajectory import read_trajectory, replay

ROWS, SIZE, Q = 16, 5, 2
N, T = 3, 2
OPTIONS = {"svrg_batches": N, "svrg_steps": T}


class Sum(nn.Module):
    """Mean over a batch of ½·(aᵢ·x)² + noise · bᵢ·x, float64; the b of all rows add up to nothing, the minimum is at 0."""

    def __init__(self, noise: float = 3.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        a, b = torch.randn(2, ROWS, SIZE, generator=generator, dtype=torch.float64)
        self.register_buffer("a", torch.linalg.qr(a).Q * ROWS**0.5)  # so that the Hessian of all rows is the identity
        self.register_buffer("b", noise * (b - b.mean(0)))
        self.x = nn.Parameter(torch.ones(SIZE, dtype=torch.float64))

    def forward(self, rows: Any = slice(None)) -> Tensor:
        return self.at(self.x, rows)

    def at(self, x: Tensor, rows: Any = slice(None)) -> Tensor:
        """The loss at x, (SIZE,)."""
        return ((self.a[rows] @ x).square() / 2 + self.b[rows] @ x).mean()


def make(model: nn.Module, lr: float = 0.05, rule: str = "svrg", **more: Any) -> tuple[ZerothOrder, Any]:
    """An engine whose coordinates are the model's one parameter, apart from it and never folded."""
    options = OPTIONS | more.pop("options", {}) if rule == "svrg" else {}
    settings = {"eps": 1e-3, "seed": 5, "num_directions": Q, "batched_probes": False} | more
    zo = ZerothOrder(model, LowRank(model, 1, 0, seed=5), rule=rule, **options, **settings)
    return zo, zo.prepare(torch.optim.SGD(zo.coordinates(), lr=lr))


def rows_of(step: int) -> list[int]:
    return [(5 * step + i) % ROWS for i in range(4)]


def z_of(step: int, index: int) -> Tensor:
    return draw_slice(Stream(5, step, index), "x", 0, SIZE, GAUSSIAN).double()


def slope(loss: Callable[[Tensor], Tensor], x: Tensor, z: Tensor, estimator: str, eps: float = 1e-3) -> float:
    if estimator == "one_sided":
        return float((loss(x + eps * z) - loss(x)) / eps)
    return float((loss(x + eps * z) - loss(x - eps * z)) / (2 * eps))


def recursion(model: Sum, steps: int, lr: float, estimator: str, skipped: tuple[int, ...] = ()) -> list[Tensor]:
    """The formula written out: ξ after every step."""
    x, found = model.x.detach().clone(), []
    for step in range(steps):

        def loss(point: Tensor, step: int = step) -> Tensor:
            return model.at(point, rows_of(step))

        z = [z_of(step, i) for i in range(Q)]
        phase = step % (N + T)
        if phase == 0:
            snapshot, parts = x.clone(), []
        if step in skipped:
            pass
        elif phase < N:
            parts.append(sum(slope(loss, snapshot, zi, estimator) * zi for zi in z) / Q)
            if phase == N - 1:
                x = x - lr * torch.stack(parts).mean(0)
        elif parts:
            differences = [slope(loss, x, zi, estimator) - slope(loss, snapshot, zi, estimator) for zi in z]
            correction = sum(d * zi for d, zi in zip(differences, z, strict=True)) / Q
            x = x - lr * (correction + torch.stack(parts).mean(0))
        found.append(x.clone())
    return found


def run(zo: ZerothOrder, optimizer: Any, steps: int, skipped: tuple[int, ...] = ()) -> list[Tensor]:
    """ξ after every step, on the batches of `rows_of`."""
    found = []
    for _ in range(steps):
        rows, factor = rows_of(zo.step), math.nan if zo.step in skipped else 1.0
        zo.estimate(lambda rows=rows, factor=factor: zo.model(rows) * factor)
        optimizer.step()
        found.append((zo.model.x + zo.subspace.coordinates["x"]).detach().clone())
    return found


# The recursion.


@pytest.mark.parametrize("estimator", ["two_point", "one_sided", "forward_gradient"])
def test_the_steps_are_those_of_the_formula(estimator: str) -> None:
    actual = run(*make(Sum(), 0.05, estimator=estimator), 13)
    torch.testing.assert_close(actual, recursion(Sum(), 13, 0.05, estimator), rtol=1e-6, atol=1e-8)
    assert all(torch.equal(point, torch.ones(SIZE).double()) for point in actual[: N - 1])
    assert not torch.equal(actual[N - 1], actual[N - 2])


@pytest.mark.parametrize(
    "skipped", [(0,), (1,), (2,), (3,), (0, 1, 2), (5, 6, 7), (4, 5)], ids=lambda steps: "-".join(map(str, steps))
)
def test_a_skipped_step_leaves_out_what_it_would_have_found(skipped: tuple[int, ...]) -> None:
    """Where no batch is left of a period, nothing moves in it."""
    actual = run(*make(Sum(), 0.05), 13, skipped)
    torch.testing.assert_close(actual, recursion(Sum(), 13, 0.05, "two_point", skipped), rtol=1e-6, atol=1e-8)


def test_estimating_a_step_again_replaces_what_was_found() -> None:
    often, optimizer = make(Sum())
    expected = run(*make(Sum()), 8)[-1]
    for step in range(8):
        for _ in range(3):
            often.estimate(lambda step=step: often.model(rows_of(step)))
        optimizer.step()
    assert torch.equal(often.model.x + often.subspace.coordinates["x"], expected)


def test_momentum_and_weight_decay_rest_while_the_snapshot_is_measured() -> None:
    zo, _ = make(Sum())
    optimizer = zo.prepare(torch.optim.AdamW(zo.coordinates(), lr=0.1, weight_decay=0.1))
    found = run(zo, optimizer, N + T + 1)
    assert torch.equal(found[-1], found[-2]) and not torch.equal(found[-2], found[-3])


# What makes it what it is.


def gradient(zo: ZerothOrder) -> Tensor:
    grad = zo.subspace.coordinates["x"].grad
    assert grad is not None
    return grad.clone()


def test_at_the_snapshot_the_estimate_is_its_gradient_to_the_bit_whatever_the_batch() -> None:
    """c - c̃ is exactly 0 there, however noisy the batch."""
    zo, optimizer = make(Sum(noise=100.0), lr=0.0)
    run(zo, optimizer, N - 1)
    zo.estimate(lambda: zo.model(rows_of(zo.step)))
    anchor = gradient(zo)
    optimizer.step()
    for rows in ([0], [7, 8], list(range(ROWS))):
        zo.estimate(lambda rows=rows: zo.model(rows))
        assert torch.equal(gradient(zo), anchor)
    assert anchor.norm() > 0


def spread(rule: str, away: float) -> float:
    """Standard deviation of the estimate over the batches at ξ̃ + away, ξ̃ being the minimum."""
    model = Sum()
    with torch.no_grad():
        model.x.zero_()
    zo, optimizer = make(model, lr=0.0, rule=rule)
    run(zo, optimizer, N)
    with torch.no_grad():
        zo.subspace.coordinates["x"].fill_(away)
    found = []
    for row in range(ROWS):
        zo.estimate(lambda row=row: zo.model([row]))
        found.append(gradient(zo))
    return torch.stack(found).std(0).norm().item()


def test_the_noise_of_the_batches_vanishes_towards_the_snapshot() -> None:
    """In proportion to the distance, where that of a plain estimate stays."""
    near, far, plain = spread("svrg", 1e-4), spread("svrg", 1e-2), spread("none", 1e-4)
    assert far == pytest.approx(100 * near, rel=1e-3)
    assert near < 1e-3 * plain
    assert spread("none", 1e-2) == pytest.approx(plain, rel=0.1)


def test_it_gets_closer_to_the_minimum_of_a_noisy_sum() -> None:
    """With snapshots that see every row: at the same learning rate, plain descent keeps the noise of its batches.

    Along all coordinates, so that there is no noise but that of the batches.
    """

    def distance(rule: str) -> float:
        model, generator = Sum(), torch.Generator().manual_seed(8)
        along = unit_vectors({"x": model.x}, SIZE, "cyclic", 0)
        options = {"options": {"svrg_batches": 4, "svrg_steps": 4}} if rule == "svrg" else {}
        zo, optimizer = make(model, 0.05 * SIZE, rule, num_directions=SIZE, direction=along, **options)
        last = []
        for step in range(160):
            part = step % 4 if step % 8 < 4 and rule == "svrg" else int(torch.randint(4, (), generator=generator))
            zo.estimate(lambda part=part: zo.model(slice(4 * part, 4 * part + 4)))
            optimizer.step()
            last.append((zo.model.x + zo.subspace.coordinates["x"]).norm().item())
        return sum(last[-40:]) / 40

    assert distance("svrg") < 0.1 * distance("none")


# What it costs, and what it is kept from.


def test_the_steps_after_the_snapshot_cost_twice_as_much() -> None:
    zo, optimizer = make(Sum())
    calls: list[int] = []
    for _ in range(2 * (N + T)):
        count = 0

        def loss() -> Tensor:
            nonlocal count
            count += 1
            return zo.model(rows_of(0))

        zo.estimate(loss)
        assert count == zo.forward_passes_per_step
        calls.append(count)
        optimizer.step()
    assert calls == 2 * (N * [2 * Q] + T * [4 * Q])
    assert zo.forward_passes == sum(calls)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_budget_ends_where_the_steps_do(tmp_path: Path, accumulation: int) -> None:
    """64 rows in batches of 8: with 3 micro-batches a step, every third has two of them."""
    options = {"zo_rule": "svrg", "zo_svrg_batches": N, "zo_svrg_steps": T, "zo_fold_steps": 0}
    options |= {"gradient_accumulation_steps": accumulation, "zo_batched_probes": False, "lr_scheduler_type": "linear"}
    model = seeded(tiny_opt, num_hidden_layers=1)
    whole = trained(tmp_path, model, max_steps=8, **options)
    spent = logged(whole, "zo/forward_passes")
    for limit, expected in ((spent[3] - 1, 3), (spent[3], 4), (spent[7], 8)):
        trainer = trained(tmp_path, model, max_steps=-1, zo_max_forward_passes=int(limit), **options)
        assert logged(trainer, "zo/forward_passes") == spent[:expected]
        assert trainer.state.max_steps == expected
    assert logged(trainer, "learning_rate") == logged(whole, "learning_rate")


def test_a_run_goes_on_and_is_replayed_to_the_bit(tmp_path: Path) -> None:
    """From before, at and after the step along the snapshot's gradient, and from the period after a fold."""
    options = {"zo_rule": "svrg", "zo_svrg_batches": 2, "zo_svrg_steps": 3, "zo_fold_steps": 5, "max_steps": 9}
    options |= {"learning_rate": 1e-3, "optim": "adamw_torch"}

    def build() -> nn.Module:
        return seeded(tiny_opt, num_hidden_layers=1)

    whole = trained(tmp_path / "run", build(), more={"callbacks": [SaveAt(1, 2, 4, 6)]}, **options)
    after = weights_of(whole.model)
    for stop in (1, 2, 4, 6):
        start = str(tmp_path / "run" / f"checkpoint-{stop}")
        resumed = trained(tmp_path / f"from{stop}", build(), resume=start, **options)
        assert_same_bits(weights_of(resumed.model), after)
        assert logged(resumed, "zo/forward_passes") == logged(whole, "zo/forward_passes")
    assert_same_bits(weights_of(replay(build(), tmp_path / "run")), after)
    for record in read_trajectory(tmp_path / "run").records:
        c, there = record.projected_gradients
        assert (c == there) == (record.step % 5 < 2)


def test_a_fold_within_a_period_is_refused() -> None:
    for fold, works in ((0, True), (5, True), (10, True), (4, False), (7, False)):
        if works:
            engine(linear_task()[0], "svrg", options=OPTIONS, fold_steps=fold)
        else:
            with pytest.raises(ValueError, match=rf"^zo_fold_steps={fold} .*use a multiple of 5, or 0\.$"):
                engine(linear_task()[0], "svrg", options=OPTIONS, fold_steps=fold)


def test_the_defaults_fit_the_default_fold() -> None:
    model = seeded(tiny_opt, num_hidden_layers=1)
    assert ZerothOrder(model, "low_rank", rule="svrg").subspace.fold_steps == 50


@pytest.mark.parametrize(
    ("more", "message"),
    [
        *(({"estimator": name}, rf"zo_estimator='{name}'.*use zo_estimator='two_point', 'one_sided' or") for name in ESTIMATORS
          if name not in ("two_point", "one_sided", "forward_gradient")),
        ({"direction": "layers"}, r"zo_direction='layers'.*use zo_direction='gaussian'"),
        ({"subspace": "full"}, r"zo_subspace='full'.*use zo_subspace='low_rank'"),
        ({"options": {"svrg_batches": 0}}, r"zo_svrg_batches=0 must be a whole number from 1"),
        ({"options": {"svrg_steps": 0}}, r"zo_svrg_steps=0 must be a whole number from 1"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_together_is_refused(more: dict[str, Any], message: str) -> None:
    options = more.pop("options", {})
    settings = {"subspace": "low_rank", "num_directions": 2} | more
    with pytest.raises(ValueError, match=message):
        ZerothOrder(seeded(tiny_opt), rule="svrg", **(options), **settings)
