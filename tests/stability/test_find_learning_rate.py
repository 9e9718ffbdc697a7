"""The search itself: on quadratics whose best rates are known, and what its numbers are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import assert_same_bits
from zo_hf.stability.find_learning_rate import (
    LEAST_EVALUATIONS,
    WALK,
    FoundRate,
    choose,
    find_learning_rate,
    forward_passes_of_search,
)
from zo_hf.stability.found_text import rises, table
from zo_hf.stability.loss_probes import RISE, LossProbes, RangeProbe, evaluations
from zo_hf.subspaces import LowRank
from zo_hf.zeroth_order import ZerothOrder

DIMENSION = 64


class Bowl(nn.Module):
    """height + ½·h·|x|² + batch · x of its parameter x."""

    def __init__(self, curvature: float, height: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.x = nn.Parameter(torch.randn(DIMENSION, generator=generator, dtype=torch.float64))
        self.curvature, self.height = curvature, height

    def forward(self, batch: Tensor) -> Tensor:
        return self.height + self.curvature / 2 * self.x @ self.x + batch @ self.x


def engine(model: nn.Module, **options: Any) -> tuple[ZerothOrder, torch.optim.Optimizer]:
    zo = ZerothOrder(model, LowRank(model, 1, 0, seed=1), batched=False, seed=1, **options)
    return zo, zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1.0))


def batches(zo: ZerothOrder, noise: float, seed: int = 0) -> Iterator[Callable[[], Tensor]]:
    """Batches whose gradients differ by `noise` in every coordinate."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        batch = noise * torch.randn(DIMENSION, generator=generator, dtype=torch.float64)
        yield lambda batch=batch: zo.model(batch)


def found(
    zo: ZerothOrder, optimizer: torch.optim.Optimizer, noise: float, steps: float, passes: int = 50
) -> FoundRate:
    source = batches(zo, noise)
    return find_learning_rate(zo, optimizer, lambda: [(next(source), 1.0)], passes, steps, 1e-5)


def after_training(rate: float, curvature: float, noise: float, steps: int) -> float:
    """The loss without noise after so many steps."""
    zo, optimizer = engine(Bowl(curvature))
    optimizer.param_groups[0]["lr"] = rate
    source = batches(zo, noise, seed=9)
    for _ in range(steps):
        zo.estimate(next(source))
        optimizer.step()
    x = zo.finish().x.detach()
    return curvature / 2 * float(x @ x)


def test_without_noise_it_is_half_the_critical_step() -> None:
    """For equal eigenvalues h the rate of fastest contraction is 1 / (h·(d + 2)), exactly."""
    zo, optimizer = engine(Bowl(3.0))
    result = found(zo, optimizer, 0.0, 500)
    assert result.bound_by in ("curvature", "mini-batch") and not result.doubts
    assert result.learning_rate == pytest.approx(1 / (3.0 * (DIMENSION + 2)), rel=0.3)


@pytest.mark.parametrize("directions", [1, 4])
def test_what_noise_bounds_is_its_formula(directions: int) -> None:
    curvature, noise, steps = 2.0, 30.0, 400.0
    zo, optimizer = engine(Bowl(curvature), num_directions=directions)
    result = found(zo, optimizer, noise, steps, passes=200)
    loss = curvature / 2 * float(zo.model.x.detach() @ zo.model.x.detach())
    variance = noise**2 * DIMENSION
    distance = math.sqrt(2 * RISE * loss / (curvature * DIMENSION))
    expected = WALK * distance * math.sqrt(directions / (variance * steps))
    assert result.bound_by == "noise"
    assert result.learning_rate == pytest.approx(expected, rel=0.3)


def test_where_noise_dominates_it_trains_as_well_as_the_second_best_of_a_grid() -> None:
    """2 / Tr H, the bound that knows of no batches, is far beyond what diverges here."""
    curvature, noise, steps = 1.0, 20.0, 200
    zo, optimizer = engine(Bowl(curvature))
    rate = found(zo, optimizer, noise, steps).learning_rate
    grid = sorted(after_training(1e-5 * 3**power, curvature, noise, steps) for power in range(1, 6))
    before = curvature / 2 * float(zo.model.x.detach() @ zo.model.x.detach())
    assert after_training(1 / DIMENSION, curvature, noise, steps) > 3 * before
    assert after_training(rate, curvature, noise, steps) <= grid[1]


def test_it_counts_its_passes_and_leaves_the_rest_as_it_was() -> None:
    model = Bowl(1.0)
    zo, optimizer = engine(model, normalize=True)
    before = {name: tensor.clone() for name, tensor in (model.state_dict() | dict(zo.subspace.coordinates)).items()}
    state, random = zo.state_dict(), torch.get_rng_state()
    result = found(zo, optimizer, 1.0, 100, passes=73)
    assert_same_bits(model.state_dict() | dict(zo.subspace.coordinates), before)
    slopes, ranges = evaluations(73)
    assert zo.forward_passes == result.forward_passes == 4 * slopes + 3 * ranges == forward_passes_of_search(73, 1)
    assert zo.state_dict() == state | {"forward_passes": result.forward_passes}
    assert torch.equal(torch.get_rng_state(), random)
    assert zo.at_start_of_step and not optimizer.state


def test_micro_batches_are_one_batch_and_cost_a_pass_each() -> None:
    zo, optimizer = engine(Bowl(1.0))
    source = batches(zo, 1.0)
    result = find_learning_rate(zo, optimizer, lambda: [(next(source), 0.5), (next(source), 0.5)], 101, 100, 1e-5)
    assert zo.forward_passes == result.forward_passes == forward_passes_of_search(101, 2) <= 101
    assert result.forward_passes > 90


@pytest.mark.parametrize("allowed", range(0, 260, 7))
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_it_never_takes_more_than_it_is_allowed(allowed: int, micro_batches: int) -> None:
    taken = forward_passes_of_search(allowed, micro_batches)
    assert taken <= allowed
    assert (taken == 0) == (allowed < LEAST_EVALUATIONS * micro_batches)


def test_too_few_passes_give_the_default_and_say_so() -> None:
    zo, optimizer = engine(Bowl(1.0))
    result = found(zo, optimizer, 1.0, 100, passes=19)
    assert (result.learning_rate, result.bound_by, zo.forward_passes) == (1e-5, "default", 0)
    assert result.doubts == (
        "19 forward passes are too few to find a learning rate with, which takes 20; the default is used.",
    )
    assert "default" in table(result)


@pytest.mark.parametrize("loss", ["flat", "not finite"])
def test_a_loss_that_says_nothing_gives_the_default_and_says_so(loss: str) -> None:
    zo, optimizer = engine(Bowl(0.0 if loss == "flat" else math.nan, height=1.0))
    result = found(zo, optimizer, 0.0, 100)
    assert result.learning_rate == 1e-5
    assert "nothing to find a learning rate from" in result.doubts[0]


# What a rate means to an optimizer.

PROBES = LossProbes(
    tuple((50.0 + 5 * i, -40.0 + 9 * i) for i in range(6)),
    tuple(RangeProbe(0.1, 2.0, 0.3 + 0.05 * i, 45.0) for i in range(5)),
)


def chosen(steps: float = 100.0, optimizer: Callable = torch.optim.SGD, options: Any = None, **more: Any) -> float:
    model = Bowl(1.0)
    zo = ZerothOrder(model, LowRank(model, 1, 0), batched=False, **more)
    return choose(
        zo, zo.prepare(optimizer(zo.coordinates(), lr=1.0, **options or {})), PROBES, 0, steps, 1.0
    ).learning_rate


def test_what_the_rate_depends_on() -> None:
    plain, size = chosen(), math.sqrt(PROBES.slope_square)
    assert chosen(steps=400.0) == pytest.approx(plain / 2)
    assert chosen(num_directions=4) == pytest.approx(plain * 2)
    assert chosen(options={"momentum": 0.9}) == pytest.approx(plain / 10)
    assert chosen(options={"momentum": 0.9, "dampening": 0.9}) == pytest.approx(plain)
    assert chosen(normalize=True) == pytest.approx(plain * size)
    assert chosen(rule="sign") == pytest.approx(plain * size)
    assert chosen(optimizer=torch.optim.AdamW) == pytest.approx(plain * size)
    assert chosen(optimizer=torch.optim.AdamW, num_directions=4) == pytest.approx(plain * size)


@pytest.mark.parametrize(
    ("options", "optimizer", "message"),
    [
        ({"estimator": "fzoo", "num_directions": 2}, torch.optim.SGD, "zo_estimator='fzoo' makes none"),
        ({"estimator": "coordinate"}, torch.optim.SGD, "zo_estimator='coordinate' makes none"),
        ({"rule": "muon", "num_directions": 2}, torch.optim.SGD, "steps of zo_rule='muon' are"),
        ({}, torch.optim.Adagrad, "steps of Adagrad are; use optim='sgd'"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], optimizer: Callable, message: str) -> None:
    model = nn.Linear(4, 4)
    zo = ZerothOrder(model, LowRank(model, 1, 0), batched=False, **options)
    prepared = zo.prepare(optimizer(zo.coordinates(), lr=1.0))
    with pytest.raises(ValueError, match=f"^learning_rate='auto' .*{message}.*give a number.*\\.$"):
        find_learning_rate(zo, prepared, lambda: [], 100, 100, 1.0)
    assert zo.forward_passes == 0


# What is made of the numbers.


def test_one_probe_that_went_too_far_does_not_decide() -> None:
    with_outlier = LossProbes(
        PROBES.slopes, (*PROBES.range, RangeProbe(1.0, 2.0, 1e9, 1e9), RangeProbe(1.0, 2.0, math.nan, math.nan))
    )
    assert with_outlier.curvature[0] == pytest.approx(PROBES.curvature[0], rel=1e-6)
    assert PROBES.curvature[0] == pytest.approx(2 * 0.4 / 0.1**2, rel=1e-6)


def test_rises_are_grouped_by_distance() -> None:
    probes = (RangeProbe(1.0, 1.0, 0.1, 0.0), RangeProbe(1.5, 1.0, 0.3, 0.0), RangeProbe(4.0, 1.0, 0.5, 0.0))
    (first, mean, error, count), (second, *_) = rises(LossProbes((), probes))
    assert (first, mean, count, second) == (1.25, pytest.approx(0.2), 2, 4.0)
    assert error == pytest.approx(0.1)


def test_the_table_says_everything() -> None:
    zo, optimizer = engine(Bowl(1.0))
    shown = table(found(zo, optimizer, 20.0, 300))
    assert all(
        word in shown for word in ("E[c^2]", "Tr H", "+-", "noise", "mini-batch", "curvature", "<- binds", "sure")
    )
