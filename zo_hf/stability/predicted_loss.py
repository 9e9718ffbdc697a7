"""The loss that a run would end with, for any learning rate, from what probes say about its beginning.

A step of rate η·m, m from the schedule, changes the loss L on average by

    -η·m·‖g‖²·ℓ + ½·(η·m)²·κ·(‖g‖²·ℓ + v)        ℓ = L/L₀,   κ = (Tr H + (q + 1)·λmax) / q

on a quadratic whose ‖g‖² falls with the loss as the Polyak-Łojasiewicz inequality has it: descent, then what the noise of
the q directions and that of batches (v) add, to second order (arXiv 2604.14669 for κ). For a constant rate that is

    ℓ = e^(-aT) + (1 - e^(-aT))·b/a,   a = η·(1 - ½ηκ)·‖g‖²/L₀,   b = ½η²κv/L₀.

In a short run the best rate is ‖g‖²/(κ·(‖g‖² + v)), whatever the number of steps T, without noise 1/κ however long it is; in
a long run the floor b/a ≈ ½ηκ·v/‖g‖² matters, and the best rate falls a little slower than 1/T. Where the size of c is divided
out, steps stay as long as the first ones: η is multiplied by √((‖g‖² + v)/(‖g‖²·ℓ + v)).

‖g‖², v and κ are known badly before training. So a rate is judged by the mean over what they may be: (c_A, c_B) of a
direction are two normal numbers of variance E[c²] = ‖g‖² + v and correlation ϱ = ‖g‖²/E[c²], ϱ as likely to be anywhere in
(0, 1) beforehand, but ‖g‖² ≤ 2κL₀, as on a quadratic that falls to 0; the logarithm of κ has the error of the measurement
and `DRIFT`, as curvature moves while a model learns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zo_hf.stability.loss_probes import LossProbes

Array = NDArray[np.float64]

#: Means of m and of m² over evenly long pieces of a run.
Schedule = Sequence[tuple[float, float]]
CONSTANT: Schedule = ((1.0, 1.0),)

#: Standard deviation of the logarithm of the curvature between the beginning of a run and the rest of it.
DRIFT = 0.7
#: A loss of so many times the first one is no worse than any other, and does not come back: the run is lost.
LOST = 3.0
#: What is so much less likely than the likeliest is left out.
NEGLIGIBLE = 1e-5
#: Rates that are looked at: from the largest that may be stable down to this part of it, a few per cent apart.
SMALLEST, NUM_RATES = 1e-6, 241
#: Steps of fixed length are followed in so many pieces at least; the others' are exact in any number.
PIECES = 64


@dataclass(frozen=True)
class Posterior:
    """What a loss may be like, each with its probability; rates are those of plain SGD on slopes.

    Attributes:
        gradient: ‖g‖²/L₀, (n,).
        noise: v/L₀, (n,).
        curvature: κ, (n,).
        weight: (n,), of sum 1.
        at_odds: whether slopes are larger than the curvature and the loss allow.
    """

    gradient: Array
    noise: Array
    curvature: Array
    weight: Array
    at_odds: bool = False


def posterior_of(probes: LossProbes, num_directions: int) -> Posterior:
    """What probes leave open.

    Args:
        probes: whose loss, slopes, curvature and its error are finite, and all but the last positive.
        num_directions: q, of a step.
    """
    trace, error = probes.curvature
    deviation = math.sqrt(math.log1p((error / trace) ** 2) + DRIFT**2)
    curvature = (trace + (num_directions + 1) * probes.largest_curvature) / num_directions
    # A normal distribution needs no more points, nor to go further; of four slopes E[c²] is known to a factor of e or so.
    away = np.linspace(-2.0, 2.0, 9)
    curvatures = curvature * np.exp(deviation * away)
    squares = probes.slope_square * np.exp(np.linspace(-2.5, 2.5, 26))[:, None]
    # From batches that have nothing in common to the whole loss, which is all that they have.
    correlations = 1.0 / (1.0 + np.exp(-np.linspace(-12.0, 9.0, 64)))
    prior = np.log(correlations) + np.log1p(-correlations)  # uniform, on points that are even in the logit
    likelihood = _log_likelihood(probes, squares, correlations) + prior

    loss = probes.loss
    gradient = np.repeat((squares * correlations / loss).ravel(), away.size)
    noise = np.repeat((squares * (1.0 - correlations) / loss).ravel(), away.size)
    curvature_of_each = np.tile(curvatures, likelihood.size)
    log_weight = (likelihood[:, :, None] - away**2 / 2).ravel()
    # If that is possible nowhere, what is the least impossible is taken.
    ratio = gradient / curvature_of_each
    most = max(2.0, float(ratio.min()))
    likeliest = float(log_weight.max())
    log_weight = np.where(ratio <= most, log_weight, -np.inf)
    at_odds = most > 2.0 or bool(log_weight.max() < likeliest + math.log(NEGLIGIBLE))
    weight = np.exp(log_weight - log_weight.max())
    keep = weight > NEGLIGIBLE
    weight = weight[keep] / weight[keep].sum()
    return Posterior(gradient[keep], noise[keep], curvature_of_each[keep], weight, at_odds)


def _log_likelihood(probes: LossProbes, squares: Array, correlations: Array) -> Array:
    """Of all slopes, for E[c²] down and ϱ across; what went too far counts by its near slope alone."""
    uncorrelated = 1.0 - correlations**2
    total = np.zeros((squares.size, correlations.size))
    for near, far in probes.pairs:
        total -= (near * near + far * far - 2 * correlations * near * far) / (2 * squares * uncorrelated)
        total -= np.log(squares) + np.log(uncorrelated) / 2
    for line in probes.lines:
        if not line.is_straight:
            total -= line.near * line.near / (2 * squares) + np.log(squares) / 2
    return total


def rates_to_look_at(posterior: Posterior, schedule: Schedule = CONSTANT) -> Array:
    """Rates in ascending order, (`NUM_RATES`,): with those beyond, steps are unstable whatever is true.

    Args:
        schedule: some m in which is not 0.
    """
    most = max(math.sqrt(square) for _, square in schedule)
    return 2.0 / float(posterior.curvature.min()) / most * np.geomspace(SMALLEST, 1.0, NUM_RATES)


def predicted_losses(
    posterior: Posterior, rates: Array, steps: float, schedule: Schedule = CONSTANT, fixed_length: bool = False
) -> Array:
    """Final losses as parts of the first, cut off at `LOST`, (rates, n).

    Args:
        posterior: (n,).
        rates: η, (rates,).
        steps: of the run.
        schedule: what multiplies the rate.
        fixed_length: whether the size of c is divided out, so that steps are as long at the end as at the beginning.
    """
    after = _after_fixed_length if fixed_length else _after
    repeat = -(-PIECES // len(schedule)) if fixed_length else 1
    duration = steps / len(schedule) / repeat
    part = np.ones((rates.size, posterior.weight.size))
    lost = np.zeros(part.shape, dtype=bool)
    for mean, square in schedule:
        step, step_square = rates[:, None] * mean * duration, rates[:, None] ** 2 * square * duration
        for _ in range(repeat):
            part = after(part, posterior, step, step_square)
            lost |= part >= LOST
            part[lost] = LOST
    return part


def _after(part: Array, posterior: Posterior, step: Array, step_square: Array) -> Array:
    """A piece of a run later, in which the rates add up to `step` and their squares to `step_square`."""
    growth = step_square * posterior.curvature / 2
    # Cut off where a run is lost, long before the exponential is too large.
    decay = np.maximum((step - growth) * posterior.gradient, -50.0)
    # (1 - e^-x)/x, and its limit at 0
    kept = np.where(np.abs(decay) < 1e-9, 1.0, -np.expm1(-decay) / np.where(decay == 0, 1.0, decay))
    return part * np.exp(-decay) + growth * posterior.noise * kept


def _after_fixed_length(part: Array, posterior: Posterior, step: Array, step_square: Array) -> Array:
    """The same, where the length of a step does not fall with the slope; half implicit, so that it ends at the floor."""
    square = posterior.gradient + posterior.noise
    stretch = np.sqrt(square / (posterior.gradient * part + posterior.noise))
    growth = step_square * posterior.curvature / 2 * square
    return (part + growth) / (1.0 + step * stretch * posterior.gradient)


def quantiles(parts: Array, weight: Array, levels: Sequence[float]) -> list[Array]:
    """Of every row of (rows, n) with weights (n,): for each level an array, (rows,)."""
    order = parts.argsort(axis=1)
    below, ordered = weight[order].cumsum(axis=1), np.take_along_axis(parts, order, axis=1)
    rows, last = np.arange(len(parts)), weight.size - 1
    return [ordered[rows, np.minimum((below < level).sum(axis=1), last)] for level in levels]
