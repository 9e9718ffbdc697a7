"""The verdict on constructed numbers, its intervals beside scipy's, and what must not change it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from zo_hf.comparison.verdict import (
    ESTIMATOR,
    NO_SIGNAL,
    OPEN,
    REACHED,
    SHARE,
    T_QUANTILES,
    TASK,
    above_control,
    beyond_target,
    verdict,
)

#: Backpropagation reaches 0.9 from 0.5, so that the target is 0.82.
FIRST = [0.89, 0.90, 0.91, 0.90, 0.90]
HIGH, LOW = [0.87, 0.88, 0.88, 0.89, 0.88], [0.60, 0.62, 0.58, 0.61, 0.59]


@pytest.mark.parametrize(
    ("exact", "estimated", "expected"),
    [
        (HIGH, HIGH, REACHED),
        (LOW, HIGH, REACHED),
        (HIGH, LOW, ESTIMATOR),
        (LOW, LOW, TASK),
        ([0.70, 0.72, 0.71, 0.70, 0.72], LOW, TASK),  # better, and yet not there
        ([0.60, 0.90, 0.95, 0.70, 0.92], LOW, OPEN),  # the seeds of the control disagree
        (LOW, [0.60, 0.90, 0.95, 0.70, 0.92], OPEN),
        (LOW, [0.82, 0.82, 0.82, 0.82, 0.82], OPEN),  # at the target
    ],
)
def test_constructed_numbers(exact: list[float], estimated: list[float], expected: str) -> None:
    assert verdict(0.5, FIRST, exact, estimated) == expected


def test_nothing_follows_where_backpropagation_gains_nothing() -> None:
    assert verdict(0.5, [0.50, 0.49, 0.48], LOW, LOW) == NO_SIGNAL
    assert verdict(0.5, [0.45, 0.75, 0.40], LOW, LOW) == OPEN, "a gain within the spread is neither one nor none"


def test_few_seeds_are_not_enough() -> None:
    assert verdict(0.5, FIRST, LOW, [0.6]) == OPEN
    # The same means and deviations: two seeds leave open what five tell.
    assert verdict(0.5, [0.89, 0.91], [0.55, 0.65], [0.55, 0.65]) == OPEN
    assert verdict(0.5, [0.89, 0.91] * 3, [0.55, 0.65] * 3, [0.55, 0.65] * 3) == TASK


def test_a_run_that_diverged_has_learned_nothing() -> None:
    assert verdict(-0.7, [-0.1, -0.11, -0.1], [-0.6] * 3, [-math.inf, -math.nan, -0.7]) == TASK


def test_quantiles_are_those_of_student() -> None:
    assert [round(float(stats.t.ppf(0.975, n)), 3) for n in range(1, 31)] == list(T_QUANTILES)


def test_the_interval_is_that_of_welch() -> None:
    # Backpropagation's scores times SHARE are a second sample, and the target is their mean, shifted.
    scaled = [SHARE * value for value in FIRST]
    welch = stats.ttest_ind(LOW, scaled, equal_var=False)
    expected = welch.confidence_interval(0.95)
    found = beyond_target(LOW, FIRST, 0.5)
    shift = (1 - SHARE) * 0.5
    # Degrees of freedom are rounded down, which may only make the interval wider, by a little.
    assert found.low <= expected.low - shift + 1e-9 and found.high >= expected.high - shift - 1e-9
    assert found.high - found.low == pytest.approx(expected.high - expected.low, rel=0.1)
    one = stats.ttest_1samp(LOW, 0.5).confidence_interval(0.95)
    assert above_control(LOW, 0.5).low == pytest.approx(one.low - 0.5, abs=1e-4)


scores = st.lists(st.integers(0, 100).map(lambda n: n / 128), min_size=2, max_size=6)


@given(scores, scores, scores, st.sampled_from([0.25, 0.5, 2.0, 8.0]), st.integers(-8, 8))
def test_neither_unit_nor_zero_point_matter(
    first: list[float], exact: list[float], estimated: list[float], factor: float, shift: int
) -> None:
    samples = [[factor * value + shift for value in values] for values in (first, exact, estimated)]
    # Binary fractions, so that a difference that is exactly 0 stays 0.
    assert verdict(factor * 0.5 + shift, *samples) in (verdict(0.5, first, exact, estimated), OPEN)


@given(scores, scores)
def test_a_method_as_good_as_backpropagation_is_never_short(first: list[float], exact: list[float]) -> None:
    assert verdict(0.25, first, exact, first) in (REACHED, NO_SIGNAL, OPEN)
