"""What forward passes say about a loss before training: slopes on two batches, and the loss far along a direction.

    slopes   c = (ℓ₊ - ℓ₋) / 2ε along one direction z on two batches, A and B:
                 ½·(c_A - c_B)²   is on average the variance that batches give to c,
                 c_A · c_B        is on average ‖g‖², without that variance; its own noise is about the variance itself;
    range    (ℓ(ξ + δz) + ℓ(ξ - δz)) / 2 - ℓ(ξ) on one batch, δ up to where the loss has risen by a good part of itself:
                 on a quadratic ½·δ²·zᵀHz, whose mean is ½·δ²·Tr H.

Every direction and every batch is a new one. No weight is written, and nothing that the run depends on is touched: the
directions are those of steps before the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from zo_hf.directions import Stream
from zo_hf.probes.probe import Probe
from zo_hf.zeroth_order import ZerothOrder

#: A step's micro-batches: what evaluates the loss of each, and its weight in the step's.
Batch = Sequence[tuple[Callable[[], Tensor], float]]

EVALUATIONS_OF_A_SLOPE = 4
EVALUATIONS_OF_A_RANGE_PROBE = 3
#: How many slopes it takes to outweigh the supposition that c is all noise of the batches.
SLOPES_BEFORE = 2
#: The rise that the distance of range probes is steered to, as a part of the loss: large enough to stand out from the
#: differences between batches and from rounding, small enough for the loss not to be flat again.
RISE = 0.2
#: A rise, as a part of the loss, beyond which only its being large is looked at.
FLAT = 3 * RISE


@dataclass(frozen=True)
class RangeProbe:
    """The loss on one batch at both ends of a direction.

    Attributes:
        distance: δ.
        loss: at the point itself.
        rise: the mean of both ends, less `loss`; it may be infinite or not a number.
        slope: their difference, divided by 2δ: c, as far as the loss is a parabola.
    """

    distance: float
    loss: float
    rise: float
    slope: float


@dataclass(frozen=True)
class LossProbes:
    """All that was measured.

    Attributes:
        slopes: (c_A, c_B) of every direction.
        range: see `RangeProbe`.
    """

    slopes: tuple[tuple[float, float], ...]
    range: tuple[RangeProbe, ...]

    @property
    def loss(self) -> float:
        """Mean over batches."""
        return sum(probe.loss for probe in self.range) / len(self.range)

    @property
    def slope_square(self) -> float:
        """E[c²] over directions, those of range probes included unless they went too far.

        Along one direction c² is as good as a square of one normal number, so it takes many of them.
        """
        each = [(a * a + b * b) / 2 for a, b in self.slopes]
        each += [probe.slope**2 for probe in self.range if share_of(probe) < FLAT]
        return _mean(each)

    @property
    def common(self) -> float:
        """‖g‖²/E[c²] as the slopes have it, from 0 (batches have nothing in common) to 1 (they are the same)."""
        square = _mean([(a * a + b * b) / 2 for a, b in self.slopes])
        return max(0.0, 1.0 - _mean([(a - b) ** 2 / 2 for a, b in self.slopes]) / square) if square else 1.0

    @property
    def batch_variance(self) -> float:
        """What of E[c²] differs between batches along the same direction; all of it, as far as few slopes say otherwise.

        The geometric mean of the estimate and of E[c²], which weighs like `SLOPES_BEFORE` slopes: a rate that rests on a
        variance that three slopes happen to understate loses the run, and one that overstates it only slows it.
        """
        count = len(self.slopes)
        return self.slope_square * (1.0 - self.common) ** (count / (count + SLOPES_BEFORE))

    @property
    def gradient_square(self) -> tuple[float, float]:
        """‖g‖² of the whole loss, and the standard error of that number."""
        return _mean_and_error([a * b for a, b in self.slopes])

    @property
    def curvature(self) -> tuple[float, float]:
        """Tr H as far as the range probes go, and its standard error; 0 where the loss did not rise.

        The κ for which κ·δ²/2 and the rises, both as parts of the loss and both cut off at `FLAT`, have the same sum: a
        probe that went where the loss explodes, or is flat again, then says only that it went too far.
        """
        total = sum(self._shares)
        if total <= 0:
            return 0.0, math.inf
        low, high = 0.0, 2 * FLAT * abs(self.loss) / min(probe.distance for probe in self.range) ** 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(self._expected(middle)) < total else (low, middle)
        expected = self._expected(high)
        rising = sum(share for share in expected if share < FLAT)
        spread = sum((seen - share) ** 2 for seen, share in zip(self._shares, expected, strict=True))
        return high, high * math.sqrt(spread) / rising if rising else math.inf

    @property
    def largest_curvature(self) -> float:
        """About λmax: Σλ²/Σλ, from how much zᵀHz differs between directions; at most the trace."""
        curvature, _ = self.curvature
        # Nearer ones differ by what batches do, more than by what directions do.
        expected = [(probe, share) for probe, share in zip(self.range, self._expected(curvature), strict=True)]
        each = [2 * probe.rise / probe.distance**2 for probe, share in expected if RISE / 4 < share < FLAT]
        if curvature <= 0 or not each:
            return curvature
        return min(curvature, _mean([(value - curvature) ** 2 for value in each]) / (2 * curvature))

    @property
    def _shares(self) -> list[float]:
        return [share_of(probe) for probe in self.range]

    def _expected(self, curvature: float) -> list[float]:
        loss = abs(self.loss)
        return [min(curvature * probe.distance**2 / 2 / loss, FLAT) if loss else FLAT for probe in self.range]


def share_of(probe: RangeProbe) -> float:
    """The rise as a part of the loss, cut off at `FLAT` either way; what is not a number is a rise."""
    if not math.isfinite(probe.rise) or not probe.loss:
        return FLAT
    return max(-FLAT, min(probe.rise / abs(probe.loss), FLAT))


def evaluations(allowed: int) -> tuple[int, int]:
    """How many slopes and range probes so many evaluations of a batch's loss are spent on."""
    slopes = allowed // (EVALUATIONS_OF_A_SLOPE + EVALUATIONS_OF_A_RANGE_PROBE)
    return slopes, (allowed - slopes * EVALUATIONS_OF_A_SLOPE) // EVALUATIONS_OF_A_RANGE_PROBE


def probe_loss(zo: ZerothOrder, draw: Callable[[], Batch], slopes: int, range_probes: int) -> LossProbes:
    """Measure.

    Args:
        zo: the engine, before its first step.
        draw: a new batch, one of a step of the run.
        slopes: how many; `EVALUATIONS_OF_A_SLOPE` each.
        range_probes: how many; `EVALUATIONS_OF_A_RANGE_PROBE` each.
    """
    eps, limit = zo.estimator.eps, zo.max_projected_grad or math.inf
    found: list[tuple[float, float]] = []
    loss = 0.0
    for index in range(slopes):
        pair = []
        for _ in range(2):
            plus, minus = _losses(zo, draw(), index, [eps, -eps])
            pair.append(max(-limit, min((plus - minus) / (2 * eps), limit)))
            loss += (plus + minus) / 4 / slopes
        found.append((pair[0], pair[1]))
    length = math.sqrt(_mean([c * c for pair in found for c in pair]))
    # As far as a straight line would have to go; not less than a probe, nor where the slope says nothing.
    distance = max(RISE * abs(loss) / length, eps) if math.isfinite(length) and length > 0 else eps
    ranges: list[RangeProbe] = []
    for index in range(range_probes):
        clean, plus, minus = _losses(zo, draw(), slopes + index, [0.0, distance, -distance])
        ranges.append(RangeProbe(distance, clean, (plus + minus) / 2 - clean, (plus - minus) / (2 * distance)))
        distance = _next_distance(ranges)
    return LossProbes(tuple(found), tuple(ranges))


def _losses(zo: ZerothOrder, batch: Batch, index: int, scales: Sequence[float]) -> list[float]:
    stream = Stream(zo.seed, step=-1 - index)
    return zo.losses_at(batch, [Probe(0, scale) for scale in scales], lambda direction: stream)


def _next_distance(ranges: Sequence[RangeProbe]) -> float:
    """Towards where the loss rises by `RISE` of itself: by ever smaller factors, as one rise may be mostly noise."""
    last, shares = ranges[-1], [share_of(probe) for probe in ranges]
    # Where it went much too far, how far is not in what the cut leaves.
    factor = math.sqrt(RISE / max(shares[-1], RISE / 64)) if shares[-1] < FLAT else 1 / 4
    near = sum(RISE / 5 <= share < FLAT for share in shares)
    return last.distance * factor ** (1 / (1 + near))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    mean = _mean(values)
    if len(values) < 2:
        return mean, math.inf
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
