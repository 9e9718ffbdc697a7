"""The verdict on a zeroth-order method that stays behind backpropagation: is the estimator the limit, or the task?

The control is the forward gradient, which arXiv 2605.15622 asks for in every comparison. It takes the exact derivative along as
many directions, in as many forward passes. No finite difference along these directions finds what it misses.

Four numbers decide. They are means over seeds of a score, an accuracy or the negative of a loss, so more is better:

    c   the better control without training: the untrained model, or the best answer that is always the same
    B   backpropagation
    F   the forward gradient
    Z   the zeroth-order method in the same subspace, with as many directions

    target  T = c + SHARE · (B − c)

A method m is *there* if the 95 % confidence interval of m − T lies above 0, and *short* if it lies below 0. An interval that
contains 0 is neither. The interval is Welch's: m − T has the variance s²ₘ/nₘ + SHARE² · s²_B/n_B, and the interval's width is a
quantile of Student's t with the degrees of freedom of Welch and Satterthwaite. So few seeds, or seeds that disagree, give
"open", and no guess.

    no signal   B is no better than c: backpropagation has not learned it either, so nothing follows
    reached     Z is there
    estimator   Z is short and F is there: the exact derivative would do, so the finite difference is the limit
    task        Z and F are short: the finite difference is not the limit, the little that a step learns is
    open        anything else: a single seed, or an interval that contains 0, that of B − c included

The spread is that over seeds of order, directions and fresh weights. Test rows are the same in all runs and are not drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, variance

#: The part of backpropagation's gain over the controls that a method must have to be there.
SHARE = 0.8

#: Quantiles of Student's t at 97.5 %, for 1, 2, ... 30 degrees of freedom.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

NO_SIGNAL, REACHED, ESTIMATOR, TASK, OPEN = "no signal", "reached", "estimator", "task", "open"


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval of a difference."""

    low: float
    high: float


def verdict(
    control: float, backpropagation: Sequence[float], forward_gradient: Sequence[float], zeroth_order: Sequence[float]
) -> str:
    """Return the verdict, one of `NO_SIGNAL`, `REACHED`, `ESTIMATOR`, `TASK` and `OPEN`.

    Args:
        control: the best score without training.
        backpropagation: final scores of the method with a backward pass, one for each seed; more is better.
        forward_gradient: those of the forward gradient.
        zeroth_order: those of the zeroth-order method in the same subspace, with as many directions.
    """
    scores = (backpropagation, forward_gradient, zeroth_order)
    if min(map(len, scores)) < 2:
        return OPEN
    # A run that diverged has no finite score, and counts as one that learned nothing.
    first, exact, estimated = ([value if math.isfinite(value) else control for value in values] for values in scores)
    if mean(first) <= control:
        return NO_SIGNAL
    if not above_control(first, control).low > 0:
        return OPEN
    of_exact, of_estimated = (beyond_target(values, first, control) for values in (exact, estimated))
    if of_estimated.low > 0:
        return REACHED
    if of_estimated.high < 0:
        if of_exact.low > 0:
            return ESTIMATOR
        if of_exact.high < 0:
            return TASK
    return OPEN


def above_control(values: Sequence[float], control: float) -> Interval:
    """Return the interval of the mean of some scores, minus a control without a spread."""
    return _interval(mean(values) - control, [(variance(values) / len(values), len(values) - 1)])


def beyond_target(values: Sequence[float], first_order: Sequence[float], control: float) -> Interval:
    """Return the interval of a method's mean score minus the target."""
    target = control + SHARE * (mean(first_order) - control)
    parts = [(variance(values) / len(values), len(values) - 1)]
    parts.append((SHARE**2 * variance(first_order) / len(first_order), len(first_order) - 1))
    return _interval(mean(values) - target, parts)


def _interval(difference: float, parts: Sequence[tuple[float, int]]) -> Interval:
    """Return Welch's interval, from the variance of each mean and its degrees of freedom."""
    total = sum(variance_of_mean for variance_of_mean, _ in parts)
    if total == 0:
        return Interval(difference, difference)
    freedom = total**2 / sum(variance_of_mean**2 / n for variance_of_mean, n in parts)
    # Rounded down, which makes the interval wider rather than narrower.
    width = T_QUANTILES[min(max(int(freedom), 1), len(T_QUANTILES)) - 1] * math.sqrt(total)
    return Interval(difference - width, difference + width)
