"""The predicted final loss of a run for any learning rate, from probes at its beginning.

A step with the rate η·m, where m comes from the schedule, changes the loss L on average by

    -η·m·‖g‖²·ℓ + ½·(η·m)²·(κ·‖g‖²·ℓ + κ_v·v)        ℓ = L/L₀,   κ = κ(q·G),   κ_v = κ(q)
    κ(n) = (Tr H + (n + 1)·λmax) / n

on a quadratic whose ‖g‖² falls in proportion to the loss, as in the Polyak-Łojasiewicz inequality. The first term is
the descent. The second is the noise of directions and of batches (v), to second order (arXiv 2604.14669 for κ(n)).
With a constant rate, after T steps,

    ℓ = e^(-aT) + (1 - e^(-aT))·b/a,   a = η·(1 - ½ηκ)·‖g‖²/L₀,   b = ½η²κ_v·v/L₀.

In a short run the best rate is ‖g‖²/(κ·‖g‖² + κ_v·v) for any T; without noise it is 1/κ for any T. In a long run the
floor b/a ≈ ½ηκ_v·v/‖g‖² matters, and the best rate falls a little more slowly than 1/T. If the size of c is divided out,
steps keep their initial length: η is multiplied by √((‖g‖²/G + v)/(‖g‖²·ℓ/G + v)).

G is the number of groups of rows with q directions of their own. Their shares aᵢ of the batch's gradient are
independent, with the mean g/G and the covariance S/G, Tr S = v. One group has, for Gaussian z (Isserlis' theorem),

    E[ĝᵢ ĝᵢᵀ] = (1 + 1/q)·aᵢaᵢᵀ + ‖aᵢ‖²/q·I        E[ĝᵢ ĝⱼᵀ] = g gᵀ/G²

and the sum of all, ĝ, has with n = q·G

    E[ĝ ĝᵀ] = (1 + 1/n)·g gᵀ + ‖g‖²/n·I + (1 + 1/q)·S + v/q·I
    E‖ĝ‖² = (1 + (d + 1)/n)·‖g‖² + (1 + (d + 1)/q)·v        random signs: d - 1 in place of d + 1, in any basis

Half of η² times the trace of H·E[ĝ ĝᵀ] is the second term, with gᵀHg and Tr(H·S) at most λmax times ‖g‖² and v.
Random signs subtract 2/q·diag(aᵢ²) from E[ĝᵢ ĝᵢᵀ], so for H ⪰ 0 their term is smaller.

Before training, ‖g‖², v and κ are known only roughly, so a rate is judged by the mean over a posterior. The pair (c_A,
c_B) of a direction is normal, with variance E[c²] = ‖g‖² + v and correlation ϱ = ‖g‖²/E[c²]. If groups of rows give v,
c_A and log v are normal, and c_B does not count, because slopes far away may be others. The prior of ϱ is uniform
on (0, 1), restricted to ‖g‖² ≤ 2κ_v·L₀, which holds on a quadratic with the minimum 0. The logarithm of κ has the error
of the measurement plus `DRIFT`, because curvature changes while a model learns. It also has the error `bend`, the logarithm
of the factor by which slopes shrink from the near probes to the far ones. On a quadratic they do not shrink. Where they
do, κ is that of another scale than the steps of a run. It is smaller than theirs, so half of `bend` is added to its
logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zo_hf.lr_finder.loss_probes import LossProbes

Array = NDArray[np.float64]

#: Means of m and of m² over pieces of a run of equal length.
Schedule = Sequence[tuple[float, float]]
CONSTANT: Schedule = ((1.0, 1.0),)

#: Standard deviation of the change in the logarithm of the curvature from the beginning of a run to the rest of it.
DRIFT = 0.7
#: The least error of log v from groups of rows, the distance of the points of E[c²]; the least v, as a part of E[c²].
NOISE_ERROR, LEAST_NOISE = 0.2, 1e-3
#: A loss of this many times the initial loss counts as diverged: the run stays there, and no loss counts as worse.
DIVERGED = 3.0
#: Points of the posterior with a smaller weight, relative to the largest, are dropped.
NEGLIGIBLE = 1e-5
#: The candidate rates go from the largest that may be stable down to this fraction of it.
SMALLEST, NUM_RATES = 1e-6, 241
#: Minimum number of pieces in which steps of fixed length are integrated. Other steps are exact in any number of
#: pieces.
MIN_PIECES = 64


@dataclass(frozen=True)
class Posterior:
    """Weighted points (‖g‖², v, κ) that describe what a loss may be like, for rates of plain SGD.

    Attributes:
        gradient: ‖g‖²/L₀, (n,).
        noise: v/L₀, (n,).
        curvature: κ, (n,).
        noise_curvature: κ_v, (n,).
        weight: the probability of each point, (n,), with sum 1.
        inconsistent: True if the slopes are larger than the curvature and the loss allow.
        groups: G, the number of groups of rows with directions of their own in a step.
    """

    gradient: Array
    noise: Array
    curvature: Array
    noise_curvature: Array
    weight: Array
    inconsistent: bool = False
    groups: int = 1

    @property
    def slope_square(self) -> Array:
        """‖g‖²/G + v over L₀, the square of a step's length before training in units of d·η²/q, (n,)."""
        return self.gradient / self.groups + self.noise


def posterior_of(probes: LossProbes, num_directions: int, groups: int = 1) -> Posterior:
    """Return the posterior of ‖g‖², v and κ, given the probes.

    Args:
        probes: measurements with a finite, positive loss, slope square and curvature, and a finite error of the
            curvature.
        num_directions: q, the number of directions of a group of rows.
        groups: G, the number of groups of rows with directions of their own in a step.
    """
    trace, error = probes.curvature
    deviation = math.sqrt(math.log1p((error / trace) ** 2) + DRIFT**2 + probes.bend**2)
    curvature, noise_curvature = (
        (trace + (count + 1) * probes.largest_curvature) / count * math.exp(probes.bend / 2)
        for count in (num_directions * groups, num_directions)
    )
    # Nine points within two standard deviations suffice for a normal distribution.
    scores = np.linspace(-2.0, 2.0, 9)
    changes = np.exp(deviation * scores)
    # Four slopes determine E[c²] to within a factor of about e.
    squares = probes.slope_square * np.exp(np.linspace(-2.5, 2.5, 26))[:, None]
    # From gradients of batches with nothing in common, to gradients that are all the same.
    correlations = 1.0 / (1.0 + np.exp(-np.linspace(-12.0, 9.0, 64)))
    prior = np.log(correlations) + np.log1p(-correlations)  # uniform in ϱ, on points that are even in its logit
    likelihood = _log_likelihood(probes, squares, correlations) + prior

    loss = probes.loss
    gradient = np.repeat((squares * correlations / loss).ravel(), scores.size)
    noise = np.repeat((squares * (1.0 - correlations) / loss).ravel(), scores.size)
    change_of_each = np.tile(changes, likelihood.size)
    log_weight = (likelihood[:, :, None] - scores**2 / 2).ravel()
    # ‖g‖² ≤ 2κ_v·L₀; if no point satisfies this, the limit is the smallest ratio of all points.
    ratio = gradient / (noise_curvature * change_of_each)
    limit = max(2.0, float(ratio.min()))
    largest = float(log_weight.max())
    log_weight = np.where(ratio <= limit, log_weight, -np.inf)
    inconsistent = limit > 2.0 or bool(log_weight.max() < largest + math.log(NEGLIGIBLE))
    weight = np.exp(log_weight - log_weight.max())
    keep = weight > NEGLIGIBLE
    weight = weight[keep] / weight[keep].sum()
    change = change_of_each[keep]
    return Posterior(
        gradient[keep], noise[keep], curvature * change, noise_curvature * change, weight, inconsistent, groups
    )


def _log_likelihood(probes: LossProbes, squares: Array, correlations: Array) -> Array:
    """Return the log likelihood of all slopes, (E[c²], ϱ).

    If a probe went too far, only its near slope counts. If groups of rows have given v, no far slope counts.
    """
    uncorrelated = 1.0 - correlations**2
    total = np.zeros((squares.size, correlations.size))
    by_rows = probes.noise_square
    for near, far in probes.pairs if by_rows is None else ():
        total -= (near * near + far * far - 2 * correlations * near * far) / (2 * squares * uncorrelated)
        total -= np.log(squares) + np.log(uncorrelated) / 2
    for line in probes.lines:
        if by_rows is not None or not line.far_is_slope:
            total -= line.near * line.near / (2 * squares) + np.log(squares) / 2
    if by_rows is not None:
        noise = max(by_rows[0], LEAST_NOISE * probes.slope_square)
        relative = by_rows[1] / noise
        variance = math.log1p(relative * relative) + NOISE_ERROR**2
        total -= np.log(squares * (1.0 - correlations) / noise) ** 2 / (2 * variance)
    return total


def candidate_rates(posterior: Posterior, schedule: Schedule = CONSTANT) -> Array:
    """Return candidate rates in ascending order, (`NUM_RATES`,); any larger rate is unstable at every posterior point.

    Args:
        posterior: the points that a rate may meet.
        schedule: the multiples of the rate, not all 0.
    """
    largest = max(math.sqrt(square) for _, square in schedule)
    return 2.0 / float(posterior.curvature.min()) / largest * np.geomspace(SMALLEST, 1.0, NUM_RATES)


def predicted_losses(
    posterior: Posterior, rates: Array, steps: float, schedule: Schedule = CONSTANT, fixed_length: bool = False
) -> Array:
    """Return final losses as fractions of the initial loss, at most `DIVERGED`, (rates, n).

    Args:
        posterior: n points.
        rates: η, (rates,); with steps of a fixed length, the η of one group whose steps are as long.
        steps: the number of steps of the run.
        schedule: the multiples of the rate.
        fixed_length: True if the size of c is divided out, so that steps keep their initial length.
    """
    after = _after_piece_of_fixed_length if fixed_length else _after_piece
    eta = rates[:, None]
    if fixed_length:
        eta = eta * np.sqrt((posterior.gradient + posterior.noise) / posterior.slope_square)
    repeat = -(-MIN_PIECES // len(schedule)) if fixed_length else 1
    duration = steps / len(schedule) / repeat
    fraction = np.ones((rates.size, posterior.weight.size))
    diverged = np.zeros(fraction.shape, dtype=bool)
    for mean, square in schedule:
        step, step_square = eta * mean * duration, eta**2 * square * duration
        for _ in range(repeat):
            fraction = after(fraction, posterior, step, step_square)
            diverged |= fraction >= DIVERGED
            fraction[diverged] = DIVERGED
    return fraction


def _after_piece(fraction: Array, posterior: Posterior, step: Array, step_square: Array) -> Array:
    """Return the loss fraction after a piece of a run.

    Args:
        fraction: the loss fraction before the piece, (rates, n).
        posterior: n points.
        step: the sum of the rates over the piece, (rates, 1) or (rates, n).
        step_square: the sum of their squares, of the same shape.
    """
    growth = step_square * posterior.curvature / 2
    floor = step_square * posterior.noise_curvature / 2
    # The limit keeps the exponential finite; a run has diverged long before.
    decay = np.maximum((step - growth) * posterior.gradient, -50.0)
    # (1 - e^-x)/x, and its limit at 0
    kept = np.where(np.abs(decay) < 1e-9, 1.0, -np.expm1(-decay) / np.where(decay == 0, 1.0, decay))
    return fraction * np.exp(-decay) + floor * posterior.noise * kept


def _after_piece_of_fixed_length(fraction: Array, posterior: Posterior, step: Array, step_square: Array) -> Array:
    """Return the same for steps of fixed length, by a semi-implicit step whose fixed point is the exact floor."""
    gradient = posterior.gradient * fraction
    stretch_square = posterior.slope_square / (gradient / posterior.groups + posterior.noise)
    growth = posterior.curvature / 2 * gradient
    growth += posterior.noise_curvature / 2 * posterior.noise
    growth *= stretch_square  # in place, as everywhere here: these arrays are large
    growth *= step_square
    growth += fraction
    divisor = np.sqrt(stretch_square, out=stretch_square)
    divisor *= step
    divisor *= posterior.gradient
    divisor += 1.0
    return growth / divisor


def weighted_quantiles(values: Array, weight: Array, levels: Sequence[float]) -> list[Array]:
    """Return quantiles of each row of `values`, (rows, n), with weights (n,): an array (rows,) for each level."""
    order = values.argsort(axis=1)
    below, ordered = weight[order].cumsum(axis=1), np.take_along_axis(values, order, axis=1)
    rows, last = np.arange(len(values)), weight.size - 1
    return [ordered[rows, np.minimum((below < level).sum(axis=1), last)] for level in levels]
