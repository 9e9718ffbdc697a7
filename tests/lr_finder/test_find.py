"""The search itself: on quadratics whose best rates are known, and what its numbers are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.conftest import assert_same_bits
from tests.lr_finder.noisy_bowl import DIMENSION, Bowl, Rows, after_training, batches, engine, square
from zo_hf.engine import ZerothOrder
from zo_hf.lr_finder.find import (
    ADAPTER_WARNING,
    MIN_EVALUATIONS,
    LRFinderResult,
    Prediction,
    choose,
    find_learning_rate,
    forward_passes_of_search,
)
from zo_hf.lr_finder.loss_probes import LineProbe, LossProbes
from zo_hf.lr_finder.report import rises, table
from zo_hf.subspaces import Adapter, LowRank

BY_ROWS = {"rows_per_direction": 1, "noise_scale_steps": 0}


def found(
    zo: ZerothOrder, optimizer: torch.optim.Optimizer, noise: float, steps: float, passes: int = 50, rows: int = 0
) -> LRFinderResult:
    source = batches(zo, noise, rows=rows)
    return find_learning_rate(zo, optimizer, lambda: [(next(source), 1.0)], passes, steps, 1e-5)


def test_without_noise_it_is_a_little_below_the_rate_of_fastest_descent() -> None:
    """For equal eigenvalues h that is 1 / (h·(d + 2)), half of the critical one; curvature may turn out larger."""
    zo, optimizer = engine(Bowl(3.0))
    result = found(zo, optimizer, 0.0, 500, passes=200)
    best = 1 / (3.0 * (DIMENSION + 2))
    assert 0.4 * best < result.learning_rate < 1.1 * best and not result.warnings
    assert result.factor < 3


@pytest.mark.parametrize(
    ("noise", "steps", "rows"),
    [
        (2.0, 200, 0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((5.0, 400, 0), (20.0, 200, 0), (2.0, 100, 4))),
    ],
)
def test_it_trains_as_well_as_the_second_best_of_a_grid(noise: float, steps: int, rows: int) -> None:
    curvature, options = 1.0, BY_ROWS if rows else {}
    zo, optimizer = engine(Bowl(curvature), **options)
    rate = found(zo, optimizer, noise, steps, rows=rows).learning_rate

    def ends_with(rate: float) -> float:
        return sum(after_training([rate] * steps, curvature, noise, seed, rows, **options) for seed in range(2)) / 2

    assert ends_with(rate) <= sorted(ends_with(1e-5 * 3**power) for power in range(2, 8 if rows else 7))[1]


def test_where_noise_dominates_it_is_far_below_what_curvature_allows() -> None:
    curvature, noise, steps = 1.0, 20.0, 200
    zo, optimizer = engine(Bowl(curvature))
    assert found(zo, optimizer, noise, steps).learning_rate < 0.2 / DIMENSION
    assert after_training([1 / DIMENSION] * steps, curvature, noise) > 3 * curvature / 2 * square(zo.model)


def test_a_run_that_will_learn_nothing_is_said_to_be_one() -> None:
    zo, optimizer = engine(Bowl(1.0))
    warning = "is not expected to lower the loss by 2%"
    (noisy,) = [each for each in found(zo, optimizer, 1000.0, 10, passes=200).warnings if warning in each]
    (short,) = [each for each in found(zo, optimizer, 0.0, 0.01, passes=200).warnings if warning in each]
    assert "larger batches" in noisy and "larger batches" not in short
    assert not any(warning in each for each in found(zo, optimizer, 2.0, 200, passes=200).warnings)


def test_it_counts_its_passes_and_leaves_the_rest_as_it_was() -> None:
    model = Bowl(1.0)
    zo, optimizer = engine(model, normalize=True)
    before = {name: tensor.clone() for name, tensor in (model.state_dict() | dict(zo.subspace.coordinates)).items()}
    state, random = zo.state_dict(), torch.get_rng_state()
    result = found(zo, optimizer, 1.0, 100, passes=73)
    assert_same_bits(model.state_dict() | dict(zo.subspace.coordinates), before)
    assert zo.forward_passes == result.forward_passes == 70 == forward_passes_of_search(73, 1)
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
    assert (taken == 0) == (allowed < MIN_EVALUATIONS * micro_batches)


def test_too_few_passes_give_the_default_and_say_so() -> None:
    zo, optimizer = engine(Bowl(1.0))
    result = found(zo, optimizer, 1.0, 100, passes=19)
    assert (result.learning_rate, result.prediction, zo.forward_passes) == (1e-5, None, 0)
    assert result.warnings == (
        "19 forward passes are too few to find a learning rate, which takes at least 20; the default is used.",
    )
    assert "default" in table(result)


@pytest.mark.parametrize("loss", ["flat", "not finite", "negative"])
def test_a_loss_that_says_nothing_gives_the_default_and_says_so(loss: str) -> None:
    bowls = {"flat": Bowl(0.0, height=1.0), "not finite": Bowl(math.nan), "negative": Bowl(1.0, height=-100.0)}
    zo, optimizer = engine(bowls[loss])
    result = found(zo, optimizer, 0.0, 100)
    assert result.learning_rate == 1e-5
    assert result.warnings == (
        {
            "flat": "the loss has no slope along the probed directions; the default is used.",
            "not finite": "the loss is not finite; the default is used.",
            "negative": "the loss of a batch is not positive, so a relative improvement of it is not defined; the default is used.",
        }[loss],
    )
    assert "the default" in table(result)


# What a rate means to an optimizer.

PROBES = LossProbes(
    tuple(LineProbe(50.0 + 5 * i, 0.1, 2.0, 0.3 + 0.05 * i, -40.0 + 30 * i) for i in range(5)),
)


def chosen(
    steps: float = 100.0,
    optimizer: Callable = torch.optim.SGD,
    options: Any = None,
    probes: LossProbes = PROBES,
    groups: int = 1,
    **more: Any,
) -> float:
    model = Bowl(1.0)
    zo = ZerothOrder(model, LowRank(model, 1, 0), batched_probes=False, **more)
    return choose(
        zo, zo.prepare(optimizer(zo.coordinates(), lr=1.0, **options or {})), probes, 0, steps, 1.0, groups=groups
    ).learning_rate


def test_what_the_rate_depends_on() -> None:
    plain, size = chosen(), math.sqrt(PROBES.slope_square)
    assert plain > chosen(steps=400.0)
    four = chosen(num_directions=4)
    assert four > 1.5 * plain
    assert chosen(options={"momentum": 0.9}) == pytest.approx(plain / 10)
    assert chosen(options={"momentum": 0.9, "dampening": 0.9}) == pytest.approx(plain)
    assert chosen(normalize=True) == pytest.approx(plain * size)
    assert chosen(rule="sign") == pytest.approx(plain * size)
    assert chosen(optimizer=torch.optim.AdamW) == pytest.approx(plain * size)
    assert chosen(optimizer=torch.optim.AdamW, num_directions=4) == pytest.approx(four * size / 2)
    assert plain < chosen(groups=4) <= four  # groups do not average the noise of batches
    normalized = chosen(groups=4, normalize=True)
    assert chosen(groups=4, rule="sign") == pytest.approx(normalized / 2)


# Directions for groups of rows.


class Inseparable(Rows):
    """A loss whose shares are not those of its rows."""

    def by_groups(self, groups: int) -> torch.Tensor:
        return super().by_groups(groups).flip(0)


@pytest.mark.parametrize(("noise", "least", "most"), [(0.0, 3.0, 8.0), (20.0, 0.8, 1.4)])
def test_directions_for_rows_allow_a_larger_rate_unless_batches_are_the_noise(
    noise: float, least: float, most: float
) -> None:
    one, many = (found(*engine(Bowl(1.0), **options), noise, 10, 200, rows=8) for options in ({}, BY_ROWS))
    assert (one.groups, many.groups) == (1, 8)
    lines = zip(one.probes.lines, many.probes.lines, strict=True)
    assert all((a.near, a.far) == pytest.approx((b.near, b.far), rel=1e-6) for a, b in lines)
    assert least < many.learning_rate / one.learning_rate < most
    assert "for 8 groups of rows" in table(many) and "groups of rows" not in table(one)


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_groups_of_rows_tell_how_much_batches_differ(noise: float) -> None:
    """Along z, slopes of batches have the variance noise²·|z|²."""
    zo, optimizer = engine(Bowl(1.0), direction="rademacher", **BY_ROWS)
    probes = found(zo, optimizer, noise, 100, 200, rows=16).probes
    value, error = probes.noise_square
    assert value == pytest.approx(noise**2 * DIMENSION, abs=4 * error + 1e-12)
    assert error == pytest.approx(value * math.sqrt(2 / 15 / len(probes.lines)), rel=0.35)
    square, error = probes.gradient_square
    assert square == pytest.approx(float(zo.model.x.detach().square().sum()), abs=4 * error)


def test_the_search_decides_whether_rows_come_apart_and_the_first_step_does_not() -> None:
    zo, optimizer = engine(Bowl(1.0), **BY_ROWS)
    before = {name: tensor.clone() for name, tensor in zo.subspace.coordinates.items()}
    random = torch.get_rng_state()
    source = batches(zo, 1.0, rows=6)
    micro_batches = [(next(source), 0.5), (next(source), 0.5)]
    result = find_learning_rate(zo, optimizer, lambda: micro_batches, 101, 100, 1e-5)
    assert result.groups == 12 and zo.row_groups.comes_apart
    assert result.forward_passes == zo.forward_passes == forward_passes_of_search(101, 2) + 4
    assert zo.at_start_of_step and torch.equal(torch.get_rng_state(), random)
    assert_same_bits(dict(zo.subspace.coordinates), before)
    other, _ = engine(Bowl(1.0), **BY_ROWS)
    for closure, weight in micro_batches:
        zo.probe(closure, weight)
        other.probe(Rows(other.model, closure.batch), weight)
    assert zo.finish_estimate() == other.finish_estimate()
    assert zo.forward_passes - result.forward_passes == other.forward_passes - 3 == 4


@pytest.mark.parametrize("kind", [Inseparable, lambda model, batch: lambda: model(batch).mean()])
def test_a_loss_that_does_not_come_apart_gets_the_rate_of_one_direction(kind: Callable) -> None:
    results = []
    for options in (BY_ROWS, {}):
        zo, optimizer = engine(Bowl(1.0), **options)
        source = batches(zo, 1.0, rows=6)
        result = find_learning_rate(
            zo, optimizer, lambda zo=zo, source=source: [(kind(zo.model, next(source).batch), 1.0)], 50, 100, 1e-5
        )
        assert zo.row_groups is None or zo.row_groups.comes_apart is False
        results.append((result.learning_rate, result.groups))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("options", "optimizer", "message"),
    [
        ({"estimator": "fzoo", "num_directions": 2}, torch.optim.SGD, "does not combine with zo_estimator='fzoo'"),
        ({"estimator": "coordinate"}, torch.optim.SGD, "does not combine with zo_estimator='coordinate'"),
        ({"rule": "muon", "num_directions": 2}, torch.optim.SGD, "does not combine with zo_rule='muon'"),
        ({}, torch.optim.Adagrad, "steps of Adagrad are; use optim='sgd'"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], optimizer: Callable, message: str) -> None:
    model = nn.Linear(4, 4)
    zo = ZerothOrder(model, LowRank(model, 1, 0), batched_probes=False, **options)
    prepared = zo.prepare(optimizer(zo.coordinates(), lr=1.0))
    with pytest.raises(ValueError, match=f"^learning_rate='auto' .*{message}.*give a number.*\\.$"):
        find_learning_rate(zo, prepared, lambda: [], 100, 100, 1.0)
    assert zo.forward_passes == 0


# What is made of the numbers.


def test_one_probe_that_went_too_far_does_not_decide() -> None:
    too_far = (LineProbe(60.0, 1.0, 2.0, 1e9, 1e9), LineProbe(60.0, 1.0, 2.0, math.nan, math.nan))
    with_outlier = LossProbes((*PROBES.lines, *too_far))
    assert with_outlier.curvature[0] == pytest.approx(PROBES.curvature[0], rel=1e-6)
    assert PROBES.curvature[0] == pytest.approx(2 * 0.4 / 0.1**2, rel=1e-6)
    assert with_outlier.pairs == PROBES.pairs
    assert with_outlier.slope_square < 1.5 * PROBES.slope_square
    assert 0.5 < chosen(probes=with_outlier) / chosen() < 2


ANY = st.floats(-1e9, 1e9) | st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan])


@settings(deadline=None, max_examples=40)
@given(
    lines=st.lists(
        st.builds(
            LineProbe,
            near=ANY | st.floats(-100, 100),
            distance=st.floats(1e-6, 1e3),
            loss=ANY | st.floats(0.1, 10),
            rise=ANY | st.floats(-1, 1),
            far=ANY | st.floats(-100, 100),
            noise=st.none() | st.floats(0, 1e9) | st.sampled_from([math.inf, math.nan]),
        ),
        min_size=1,
        max_size=6,
    ),
    steps=st.integers(1, 10**12),
    ends=st.sampled_from([1.0, 0.1, 0.0]),
)
def test_whatever_was_measured_there_is_a_rate(lines: list[LineProbe], steps: int, ends: float) -> None:
    """A number above 0, which no run is predicted to be worse with than with another, or the default and why."""
    zo, optimizer = engine(Bowl(1.0))
    schedule = [(m, m * m) for m in np.linspace(1.0, ends, 8).tolist()]
    with np.errstate(all="ignore"):
        result = choose(zo, optimizer, LossProbes(tuple(lines)), 20, steps, 1e-5, schedule, groups=8)
    if result.prediction is None:
        assert result.learning_rate == 1e-5 and result.warnings[0].endswith("the default is used.")
    else:
        assert 0 < result.learning_rate < math.inf and result.factor >= 1
        assert all(math.isfinite(loss) for loss in result.prediction.losses)
    assert table(result)


def test_the_largest_curvature_is_at_most_the_trace() -> None:
    def probes(outlier: float) -> LossProbes:
        rises = (0.4, 0.35, 0.45, 0.4, 0.38, outlier)
        return LossProbes(tuple(LineProbe(5.0, 0.1, 2.0, rise, 5.0) for rise in rises))

    assert probes(0.42).largest_curvature < 1
    assert probes(50.0).largest_curvature == probes(1e200).largest_curvature == probes(50.0).curvature[0]


@pytest.mark.parametrize(("initial", "bent"), [(True, True), ("gaussian", True), (False, False)])
def test_an_adapter_that_begins_at_zero_is_said_to_bend_the_loss(initial: Any, bent: bool) -> None:
    settings = LoraConfig(r=2, target_modules=["0"], init_lora_weights=initial)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), settings)
    zo = ZerothOrder(model, Adapter(model), batched_probes=False)
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1.0))
    assert (ADAPTER_WARNING in choose(zo, optimizer, PROBES, 20, 100, 1e-5).warnings) == bent


def test_rises_are_grouped_by_distance() -> None:
    lines = [LineProbe(0.0, distance, 1.0, rise, 0.0) for distance, rise in ((1.0, 0.1), (1.5, 0.3), (4.0, 0.5))]
    (first, mean, error, count), (second, *_) = rises(LossProbes(tuple(lines)))
    assert (first, mean, count, second) == (1.25, pytest.approx(0.2), 2, 4.0)
    assert error == pytest.approx(0.1)


def test_the_prediction_is_of_the_rate_that_was_found() -> None:
    zo, optimizer = engine(Bowl(1.0))
    result = found(zo, optimizer, 5.0, 300)
    prediction = result.prediction
    index = prediction.rates.index(result.learning_rate)
    assert prediction.losses[index] == min(prediction.losses)
    assert all(low <= high for low, high in zip(prediction.low, prediction.high, strict=True))
    assert prediction.low[index] <= prediction.losses[index] < result.probes.loss


@pytest.mark.parametrize("rise", [-0.4, 1e4, math.inf])
@pytest.mark.parametrize("nearer", [1.0, 0.25])
def test_a_loss_that_falls_everywhere_or_explodes_gives_the_default(rise: float, nearer: float) -> None:
    lines = [
        LineProbe(c, 0.1 * nearer**i, 2.0, rise * nearer ** (2 * i), c) for i, c in enumerate((5.0, -6.0, 4.0, 7.0))
    ]
    said = "did not rise along the probed directions" if rise < 0 else "was too large wherever it was probed"
    zo, optimizer = engine(Bowl(1.0))
    result = choose(zo, optimizer, LossProbes(tuple(lines)), 20, 100, 1e-5)
    assert result.learning_rate == 1e-5 and said in result.warnings[0] and result.prediction is None


def test_rises_that_are_lost_in_batches_are_said_to_be() -> None:
    lines = [LineProbe(c, 0.1, 2.0, rise, c) for c, rise in ((5.0, 0.9), (-6.0, -0.8), (4.0, 0.3), (7.0, -0.3))]
    zo, optimizer = engine(Bowl(1.0))
    result = choose(zo, optimizer, LossProbes(tuple(lines)), 20, 100, 1e-5)
    assert any("the differences between batches hide" in warning for warning in result.warnings)


@pytest.mark.parametrize("options", [{"rule": "sign"}, {"normalize": True}])
def test_steps_that_do_not_get_shorter_are_found_a_rate_that_trains(options: dict[str, Any]) -> None:
    curvature, steps = 3.0, 300
    zo, optimizer = engine(Bowl(curvature), **options)
    rate = found(zo, optimizer, 0.0, steps).learning_rate

    def ends_with(rate: float) -> float:
        return after_training([rate] * steps, curvature, 0.0, **options)

    assert ends_with(rate) <= sorted(ends_with(rate * 3.0**power) for power in (-2, -1, 1, 2))[1]


def test_the_table_says_everything() -> None:
    zo, optimizer = engine(Bowl(1.0))
    result = found(zo, optimizer, 5.0, 300)
    shown, (square, error) = table(result), result.probes.gradient_square
    assert f"E[c^2] {result.probes.slope_square:.3g}, |g|^2 {square:.3g} +- {error:.2g}, from 10 directions" in shown
    assert f"{result.learning_rate:>10.2g} {min(result.prediction.losses):>27.3g}" in shown
    assert shown.count("<- lowest") == 1 and f"learning rate {result.learning_rate:.3g}, to within a factor" in shown


def test_rates_that_were_not_looked_at_are_not_in_the_table() -> None:
    prediction = Prediction((1.0, 1.1, 3.0), (3.0, 4.0, 5.0), (2.0,) * 3, (6.0,) * 3)
    shown = table(LRFinderResult(1.0, None, 20, prediction, 2.0, ()))
    assert [line.split()[0] for line in shown.splitlines()[1:3]] == ["1", "3"] and "10" not in shown.split()


def test_slopes_that_shrink_far_away_give_a_smaller_rate_and_a_doubt() -> None:
    def result(shrink: float) -> LRFinderResult:
        slopes = (5.0, -6.0, 4.0, 7.0, -5.0, 6.0)
        lines = tuple(LineProbe(c, 0.1, 4.0, 0.8, c * shrink * (-1) ** i) for i, c in enumerate(slopes))
        zo, optimizer = engine(Bowl(1.0))
        return choose(zo, optimizer, LossProbes(lines), 30, 300, 1e-5)

    straight, bent = result(0.8), result(0.1)
    assert bent.learning_rate < straight.learning_rate
    assert any("slopes shrink to 1/" in warning for warning in bent.warnings)
    assert not any("slopes shrink to 1/" in warning for warning in straight.warnings)
