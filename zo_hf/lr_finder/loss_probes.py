"""Measurements of a loss by forward passes before training. Each direction is probed on two batches, A and B:

    near     c_A = (ℓ_A(ξ + εz) - ℓ_A(ξ - εz)) / 2ε,    the slope as a step would measure it;
    far      c_B = (ℓ_B(ξ + δz) - ℓ_B(ξ - δz)) / 2δ,    the slope at a larger distance, and
             (ℓ_B(ξ + δz) + ℓ_B(ξ - δz)) / 2 - ℓ_B(ξ),  the rise, with δ steered to a rise of `TARGET_RISE`.

On a quadratic the rise has the mean ½·δ²·Tr H, and c_A·c_B has the mean ‖g‖². c² has the mean ‖g‖² + v, where v comes
from the differences between batches. If a step has directions for G groups of rows, the near probes of batch A give a
slope for each group's share of the loss, all along the same direction. Their mean square deviation has the mean v/G, at
the distance of a step and without batch B. Every direction and every batch is new. No weight is written, and nothing
that the run depends on changes: the directions are those of negative step numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.lr_finder.step_groups import Batch, shares_at
from zo_hf.rng import Stream

EVALUATIONS_NEAR, EVALUATIONS_FAR = 2, 3
EVALUATIONS = EVALUATIONS_NEAR + EVALUATIONS_FAR
#: The target of the rise, as a fraction of the loss. It is large enough to stand out from rounding and from the
#: differences between batches, and small enough to be below any plateau of the loss.
TARGET_RISE = 0.2
#: The limit on the rise, as a fraction of the loss. A larger rise tells only that the probe went too far.
RISE_LIMIT = 3 * TARGET_RISE


@dataclass(frozen=True)
class LineProbe:
    """The loss along one direction.

    Attributes:
        near: c_A, the slope between the near probes.
        distance: δ, the distance of the far probes.
        loss: ℓ_B at the current point.
        rise: the mean of ℓ_B at the two far probes, minus `loss`; it may be infinite or NaN.
        far: c_B, the slope between the far probes.
        noise: v along this direction, from the slopes of groups of rows; None if they share their directions.
    """

    near: float
    distance: float
    loss: float
    rise: float
    far: float
    noise: float | None = None

    @property
    def relative_rise(self) -> float:
        """The rise as a fraction of the loss, limited to ±`RISE_LIMIT`; an infinite or NaN rise counts as the limit."""
        if not math.isfinite(self.rise) or not self.loss:
            return RISE_LIMIT
        return max(-RISE_LIMIT, min(self.rise / abs(self.loss), RISE_LIMIT))

    @property
    def far_is_slope(self) -> bool:
        """True if the far probes are near enough for `far` to measure the slope."""
        return self.relative_rise < RISE_LIMIT


@dataclass(frozen=True)
class LossProbes:
    """The measurements along all directions.

    Attributes:
        lines: the measurements of each direction, at least one.
    """

    lines: tuple[LineProbe, ...]

    @property
    def loss(self) -> float:
        """The mean loss over batches."""
        return _mean([line.loss for line in self.lines])

    @property
    def loss_deviation(self) -> float:
        """The standard deviation of the loss from batch to batch."""
        losses = [line.loss for line in self.lines]
        return statistics.stdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else 0.0

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """(c_A, c_B) of the directions on which both are slopes."""
        return [(line.near, line.far) for line in self.lines if line.far_is_slope]

    @property
    def slope_square(self) -> float:
        """E[c²] over directions; each c is about normally distributed over directions.

        With slopes of groups of rows, which need no batch B, only near slopes count: those far away may be others.
        """
        far = [line.far for line in self.lines if line.far_is_slope and line.noise is None]
        slopes = [line.near for line in self.lines] + far
        return _mean([slope * slope for slope in slopes])

    @property
    def bend(self) -> float:
        """The logarithm of the factor by which slopes shrink from the near probes to the far ones; 0 on a quadratic.

        Batches make near and far slopes larger alike. The error of the logarithm is about 1/√n for n directions, and what
        the error explains is left out.
        """
        far = [far * far for _, far in self.pairs]
        near = _mean([line.near * line.near for line in self.lines])
        if not far or not near > _mean(far) > 0:
            return 0.0
        return math.sqrt(max(0.0, (math.log(near / _mean(far)) / 2) ** 2 - 1 / len(far)))

    @property
    def gradient_square(self) -> tuple[float, float]:
        """‖g‖² of the whole loss, and its standard error."""
        by_rows = [line.near * line.near - line.noise for line in self.lines if line.noise is not None]
        return _mean_and_error(by_rows or [near * far for near, far in self.pairs])

    @property
    def noise_square(self) -> tuple[float, float] | None:
        """v from the slopes of groups of rows, and its standard error; None if they share their directions."""
        found = [line.noise for line in self.lines if line.noise is not None]
        return _mean_and_error(found) if found else None

    @cached_property
    def curvature(self) -> tuple[float, float]:
        """Tr H within the distance of the probes, and its standard error; 0 if the loss did not rise.

        This is the κ for which κ·δ²/2 and the measured rises have the same sum over directions, both relative to the
        loss and both limited to `RISE_LIMIT`. The limit keeps a probe that went too far from deciding the sum: it may
        lie where the loss explodes, or on a plateau. A sum below the noise from the differences between batches is
        replaced by that noise.
        """
        rises = [line.relative_rise for line in self.lines]
        noise = math.hypot(*rises)
        total = max(sum(rises), noise) if sum(rises) > -noise else 0.0
        if total <= 0:
            return 0.0, math.inf
        low, high = 0.0, 2 * RISE_LIMIT * abs(self.loss) / min(line.distance for line in self.lines) ** 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(self._expected_rises(middle)) < total else (low, middle)
        if min(rises) >= RISE_LIMIT:  # the result is only a lower bound
            return high, math.inf
        expected = self._expected_rises(high)
        rising = sum(rise for rise in expected if rise < RISE_LIMIT)
        spread = sum((measured - rise) ** 2 for measured, rise in zip(rises, expected, strict=True))
        return high, high * math.sqrt(spread) / rising if rising else math.inf

    @property
    def largest_curvature(self) -> float:
        """An estimate of λmax: Σλ²/Σλ, from the variance of zᵀHz over directions, and at most the trace."""
        curvature, _ = self.curvature
        # Nearer probes are left out: they differ by their batches more than by their directions.
        expected = [(line, rise) for line, rise in zip(self.lines, self._expected_rises(curvature), strict=True)]
        each = [2 * line.rise / line.distance**2 for line, rise in expected if TARGET_RISE / 4 < rise < RISE_LIMIT]
        deviations = [value - curvature for value in each if math.isfinite(value)]
        if curvature <= 0 or not deviations:
            return curvature
        return min(curvature, _mean([value * value for value in deviations]) / (2 * curvature))

    def _expected_rises(self, curvature: float) -> list[float]:
        loss = abs(self.loss)
        return [
            min(curvature * line.distance**2 / 2 / loss, RISE_LIMIT) if loss else RISE_LIMIT for line in self.lines
        ]


def probe_loss(zo: ZerothOrder, draw: Callable[[], Batch], directions: int, groups: int = 1) -> LossProbes:
    """Measure the loss along random directions.

    Args:
        zo: the engine, before its first step.
        draw: returns a new batch of the run at every call.
        directions: the number of directions; each takes `EVALUATIONS` evaluations of a batch's loss.
        groups: the number of groups of rows with directions of their own in a step.
    """
    eps, limit = zo.estimator.eps, zo.max_projected_grad or math.inf
    near: list[float] = []
    noise: list[float | None] = []
    loss = 0.0
    for index in range(directions):
        if groups > 1:
            shares = shares_at(zo, draw(), _stream(zo, index), [eps, -eps])
        else:
            shares = [_losses(zo, draw(), index, [eps, -eps])]
        slopes = [_clipped((plus - minus) / (2 * eps), limit) for plus, minus in shares]
        near.append(sum(slopes))
        noise.append(_noise(slopes) if groups > 1 else None)
        loss += sum(plus + minus for plus, minus in shares) / 2 / directions
    length = math.sqrt(_mean([c * c for c in near]))
    # Start where a linear loss would reach the target rise, at least at ε, and at ε if the slope is unusable.
    distance = max(TARGET_RISE * abs(loss) / length, eps) if math.isfinite(loss) and 0 < length < math.inf else eps
    lines: list[LineProbe] = []
    for index, slope in enumerate(near):
        clean, plus, minus = _losses(zo, draw(), index, [0.0, distance, -distance])
        far = _clipped((plus - minus) / (2 * distance), groups * limit)
        lines.append(LineProbe(slope, distance, clean, (plus + minus) / 2 - clean, far, noise[index]))
        distance = _next_distance(lines)
    return LossProbes(tuple(lines))


def _losses(zo: ZerothOrder, batch: Batch, index: int, scales: Sequence[float]) -> list[float]:
    stream = _stream(zo, index)
    return zo.losses_at(batch, [Probe(0, scale) for scale in scales], lambda direction: stream)


def _stream(zo: ZerothOrder, index: int) -> Stream:
    return Stream(zo.seed, step=-1 - index)


def _next_distance(lines: Sequence[LineProbe]) -> float:
    """Return the next far distance, closer to a relative rise of `TARGET_RISE`.

    The changes become smaller over the directions, because a single rise may be mostly noise.
    """
    last, rises = lines[-1], [line.relative_rise for line in lines]
    # A rise hidden by the differences between batches does not tell how much further to go, so the factor is limited
    # to 3. A rise at the limit does not tell how far back to go, so the factor is fixed there.
    factor = math.sqrt(TARGET_RISE / max(rises[-1], TARGET_RISE / 9)) if rises[-1] < RISE_LIMIT else 1 / 4
    usable = sum(TARGET_RISE / 5 <= rise < RISE_LIMIT for rise in rises)
    return last.distance * factor ** (1 / (1 + usable))


def _noise(slopes: Sequence[float]) -> float:
    """Return v along a direction, from the slopes of groups of rows, each with the variance v divided by their number."""
    mean = _mean(slopes)
    deviations = [slope - mean for slope in slopes]
    return len(slopes) * sum(each * each for each in deviations) / (len(slopes) - 1)


def _clipped(slope: float, limit: float) -> float:
    """Clip a slope as a step would; NaN stays NaN."""
    return slope if math.isnan(slope) else max(-limit, min(slope, limit))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return _mean(values) if values else 0.0, math.inf
    mean = _mean(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
