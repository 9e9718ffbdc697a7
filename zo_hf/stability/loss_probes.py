"""What forward passes say about a loss before training, along directions that each see two batches, A and B:

    near     c_A = (ℓ_A(ξ + εz) - ℓ_A(ξ - εz)) / 2ε,    as a step would find it;
    far      c_B = (ℓ_B(ξ + δz) - ℓ_B(ξ - δz)) / 2δ,    and
             (ℓ_B(ξ + δz) + ℓ_B(ξ - δz)) / 2 - ℓ_B(ξ),  the rise, δ up to where it is a good part of the loss.

On a quadratic the mean of the rise is ½·δ²·Tr H, that of c² is ‖g‖² + v, where v is what batches add, and that of c_A·c_B
is ‖g‖². Every direction and every batch is a new one. No weight is written, and nothing that the run depends on is touched:
the directions are those of steps before the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from zo_hf.directions import Stream
from zo_hf.probes.probe import Probe
from zo_hf.zeroth_order import ZerothOrder

#: A step's micro-batches: what evaluates the loss of each, and its weight in the step's.
Batch = Sequence[tuple[Callable[[], Tensor], float]]

EVALUATIONS_NEAR, EVALUATIONS_FAR = 2, 3
EVALUATIONS = EVALUATIONS_NEAR + EVALUATIONS_FAR
#: The rise that distances are steered to, as a part of the loss: large enough to stand out from the differences between
#: batches and from rounding, small enough for the loss not to be flat again.
RISE = 0.2
#: A rise, as a part of the loss, beyond which only its being large is looked at.
FLAT = 3 * RISE


@dataclass(frozen=True)
class LineProbe:
    """The loss along one direction.

    Attributes:
        near: c_A.
        distance: δ.
        loss: ℓ_B at the point itself.
        rise: the mean of ℓ_B at both far ends, less `loss`; it may be infinite or not a number.
        far: c_B.
    """

    near: float
    distance: float
    loss: float
    rise: float
    far: float

    @property
    def share(self) -> float:
        """The rise as a part of the loss, cut off at `FLAT` either way; what is not a number is a rise."""
        if not math.isfinite(self.rise) or not self.loss:
            return FLAT
        return max(-FLAT, min(self.rise / abs(self.loss), FLAT))

    @property
    def is_straight(self) -> bool:
        """Whether the far end is near enough for `far` to be a slope."""
        return self.share < FLAT


@dataclass(frozen=True)
class LossProbes:
    """All that was measured.

    Attributes:
        lines: see `LineProbe`; at least one.
    """

    lines: tuple[LineProbe, ...]

    @property
    def loss(self) -> float:
        """Mean over batches."""
        return _mean([line.loss for line in self.lines])

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """(c_A, c_B) of the directions on which both were found."""
        return [(line.near, line.far) for line in self.lines if line.is_straight]

    @property
    def slope_square(self) -> float:
        """E[c²] over directions; along one direction c² is as good as the square of one normal number."""
        slopes = [line.near for line in self.lines] + [line.far for line in self.lines if line.is_straight]
        return _mean([slope * slope for slope in slopes])

    @property
    def gradient_square(self) -> tuple[float, float]:
        """‖g‖² of the whole loss, and the standard error of that number."""
        return _mean_and_error([near * far for near, far in self.pairs])

    @cached_property
    def curvature(self) -> tuple[float, float]:
        """Tr H as far as the probes go, and its standard error; 0 where the loss did not rise.

        The κ for which κ·δ²/2 and the rises, both as parts of the loss and both cut off at `FLAT`, have the same sum: a
        probe that went where the loss explodes, or is flat again, then says only that it went too far. A sum that is lost
        in the differences between batches is taken to be as large as these.
        """
        shares = [line.share for line in self.lines]
        noise = math.hypot(*shares)
        total = max(sum(shares), noise) if sum(shares) > -noise else 0.0
        if total <= 0:
            return 0.0, math.inf
        low, high = 0.0, 2 * FLAT * abs(self.loss) / min(line.distance for line in self.lines) ** 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(self._expected(middle)) < total else (low, middle)
        if min(shares) >= FLAT:  # at least so large, and nobody knows how much larger
            return high, math.inf
        expected = self._expected(high)
        rising = sum(share for share in expected if share < FLAT)
        spread = sum((seen - share) ** 2 for seen, share in zip(shares, expected, strict=True))
        return high, high * math.sqrt(spread) / rising if rising else math.inf

    @property
    def largest_curvature(self) -> float:
        """About λmax: Σλ²/Σλ, from how much zᵀHz differs between directions; at most the trace, as with one far outlier."""
        curvature, _ = self.curvature
        # Nearer ones differ by what batches do, more than by what directions do.
        expected = [(line, share) for line, share in zip(self.lines, self._expected(curvature), strict=True)]
        each = [2 * line.rise / line.distance**2 for line, share in expected if RISE / 4 < share < FLAT]
        away = [value - curvature for value in each if math.isfinite(value)]
        if curvature <= 0 or not away:
            return curvature
        return min(curvature, _mean([value * value for value in away]) / (2 * curvature))

    def _expected(self, curvature: float) -> list[float]:
        loss = abs(self.loss)
        return [min(curvature * line.distance**2 / 2 / loss, FLAT) if loss else FLAT for line in self.lines]


def probe_loss(zo: ZerothOrder, draw: Callable[[], Batch], directions: int) -> LossProbes:
    """Measure.

    Args:
        zo: the engine, before its first step.
        draw: a new batch, one of a step of the run.
        directions: how many; `EVALUATIONS` each, of a batch.
    """
    eps, limit = zo.estimator.eps, zo.max_projected_grad or math.inf
    near: list[float] = []
    loss = 0.0
    for index in range(directions):
        plus, minus = _losses(zo, draw(), index, [eps, -eps])
        near.append(_within((plus - minus) / (2 * eps), limit))
        loss += (plus + minus) / 2 / directions
    length = math.sqrt(_mean([c * c for c in near]))
    # As far as a straight line would have to go; not less than a probe, nor where the slope says nothing.
    distance = max(RISE * abs(loss) / length, eps) if math.isfinite(loss) and 0 < length < math.inf else eps
    lines: list[LineProbe] = []
    for index, slope in enumerate(near):
        clean, plus, minus = _losses(zo, draw(), index, [0.0, distance, -distance])
        far = _within((plus - minus) / (2 * distance), limit)
        lines.append(LineProbe(slope, distance, clean, (plus + minus) / 2 - clean, far))
        distance = _next_distance(lines)
    return LossProbes(tuple(lines))


def _losses(zo: ZerothOrder, batch: Batch, index: int, scales: Sequence[float]) -> list[float]:
    stream = Stream(zo.seed, step=-1 - index)
    return zo.losses_at(batch, [Probe(0, scale) for scale in scales], lambda direction: stream)


def _next_distance(lines: Sequence[LineProbe]) -> float:
    """Towards where the loss rises by `RISE` of itself: by ever smaller factors, as one rise may be mostly noise."""
    last, shares = lines[-1], [line.share for line in lines]
    # A rise that is lost in the differences between batches says nothing of how much further to go, and where it went much
    # too far, how far is not in what the cut leaves.
    factor = math.sqrt(RISE / max(shares[-1], RISE / 9)) if shares[-1] < FLAT else 1 / 4
    near = sum(RISE / 5 <= share < FLAT for share in shares)
    return last.distance * factor ** (1 / (1 + near))


def _within(slope: float, limit: float) -> float:
    """As a step would clip it; what is not a number stays so."""
    return slope if math.isnan(slope) else max(-limit, min(slope, limit))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return _mean(values) if values else 0.0, math.inf
    mean = _mean(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
