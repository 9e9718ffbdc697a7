"""A learning rate from forward passes before training.

Three bounds, and the least of them is the rate:

    noise      η · √(Σ mₜ²) · √(v/q)  ≤  φ · δ
    mini-batch η  ≤  ½ · η_crit,   η_crit = 2·‖g‖² / (E[c²]·(Tr H + (q+1)·λmax)/q)
    curvature  η  ≤  ½ · 2q / (Tr H + (q+1)·λmax)                                    (arXiv 2604.14669, its lower bound)

The first is what binds on a language model. Every batch has a gradient of its own, and steps along the noise of them add
up to a random walk: after steps with the rates η·mₜ (m is the schedule), its length per coordinate is
η·√(Σ mₜ²)·√(v/q), with v the variance that batches give to c and q the directions of a step. A direction is as good as
another for such a walk, so a probe far along one direction shows at once where a whole run of noise would lead: δ is the
distance at which the loss has risen by `RISE` of itself. A run makes good a rise that is small beside what it learns: φ
takes it down to 2.5 % of the loss (φ² · `RISE`), for a curvature one standard error up. φ was set on the problems of
docs/stability.md: curvature and variance grow as a model learns, so a rate at which the rise would be a tenth diverges.

The second is the step that lowers the loss most if ‖g‖² were as large as the probes allow: few of them leave it almost
free, as c_A·c_B has a standard error of about v/√(number of slopes).

What the rate means depends on the optimizer. With momentum β a step is 1/(1 - β) as long in the end; Adam, zo_normalize and
zo_rule=sign divide the size of c out, so that the rate is that of SGD times √E[c²] (Adam's: times √(E[c²]/q)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from zo_hf.optimizers import SeededSGD
from zo_hf.optimizers.sign import Sign
from zo_hf.stability.loss_probes import (
    EVALUATIONS_OF_A_RANGE_PROBE,
    EVALUATIONS_OF_A_SLOPE,
    RISE,
    SLOPES_BEFORE,
    Batch,
    LossProbes,
    evaluations,
    probe_loss,
)
from zo_hf.zeroth_order import ZerothOrder

#: Of a run's forward passes, what the search may take.
SHARE = 0.05
#: Evaluations of a batch's loss, at least and at most: fewer say nothing, and more say little more.
LEAST_EVALUATIONS, MOST_EVALUATIONS = 20, 200
#: φ: the noise of a run may lead this far, as a part of the distance at which the loss has risen by `RISE`.
WALK = 0.35
#: A rate that may be further off than by this factor is not sure.
UNSURE = 3.0


@dataclass(frozen=True)
class FoundRate:
    """A learning rate, and what it comes from.

    Attributes:
        learning_rate: to be given to the optimizer.
        probes: what was measured; None where nothing was.
        forward_passes: what that took.
        bounds: rates that were not to be exceeded, in the optimizer's units, by name.
        rate_of_distance: the rate whose noise leads a run so far, per unit of distance; for a table of the range probes.
        factor: by which the rate may be off either way, one standard error.
        doubts: why it is not sure, in sentences; empty if it is.
    """

    learning_rate: float
    probes: LossProbes | None
    forward_passes: int
    bounds: Mapping[str, float]
    rate_of_distance: float
    factor: float
    doubts: tuple[str, ...]

    @property
    def bound_by(self) -> str:
        """Name of the least bound; "default" where nothing was found."""
        return min(self.bounds, key=lambda name: self.bounds[name]) if self.bounds else "default"


def forward_passes_of_search(allowed: int, micro_batches: int) -> int:
    """What a search takes of the forward passes it is allowed, exactly; 0 if they are too few for any."""
    within = min(allowed // micro_batches, MOST_EVALUATIONS)
    if within < LEAST_EVALUATIONS:
        return 0
    slopes, range_probes = evaluations(within)
    return (slopes * EVALUATIONS_OF_A_SLOPE + range_probes * EVALUATIONS_OF_A_RANGE_PROBE) * micro_batches


def check_findable(zo: ZerothOrder, optimizer: Optimizer) -> None:
    """Refuse a run whose rate these probes say nothing about.

    Raises:
        ValueError: the message names the option and what to use instead.
    """
    estimator, rule = zo.estimator, zo.rule
    way_out = "give a number, or leave learning_rate out for the default"
    if estimator.is_scale_free or estimator.along_coordinates:
        raise ValueError(
            f"learning_rate='auto' is for slopes along random directions, and zo_estimator={estimator.name!r} makes none; "
            f"{way_out}."
        )
    if rule.name not in ("none", Sign.name):
        raise ValueError(
            f"learning_rate='auto' does not know how long the steps of zo_rule={rule.name!r} are; {way_out}."
        )
    if not isinstance(optimizer, (torch.optim.SGD, SeededSGD, torch.optim.Adam)):
        raise ValueError(
            f"learning_rate='auto' does not know how long the steps of {type(optimizer).__name__} are; use optim='sgd' or "
            f"'adamw_torch', or {way_out}."
        )


def find_learning_rate(
    zo: ZerothOrder,
    optimizer: Optimizer,
    draw: Callable[[], Batch],
    forward_passes: int,
    steps: float,
    default: float,
) -> FoundRate:
    """Probe the loss and choose; the model, the optimizer and the engine's step stay as they are.

    Args:
        zo: the engine, before its first step.
        optimizer: what `zo.prepare` was given.
        draw: a new batch at every call, one of a step of the run, always of as many micro-batches.
        forward_passes: what the search may take.
        steps: of the run; with a schedule that multiplies the rate by mₜ, Σ mₜ².
        default: the rate where nothing can be found.

    Raises:
        ValueError: see `check_findable`.
    """
    check_findable(zo, optimizer)
    first = draw()
    if not forward_passes_of_search(forward_passes, len(first)):
        doubt = (
            f"{forward_passes} forward passes are too few to find a learning rate with, which takes "
            f"{LEAST_EVALUATIONS * len(first)}; the default is used."
        )
        return FoundRate(default, None, 0, {}, math.nan, math.nan, (doubt,))
    before = zo.forward_passes
    ready = [first]
    probes = probe_loss(
        zo, lambda: ready.pop() if ready else draw(), *evaluations(min(forward_passes // len(first), MOST_EVALUATIONS))
    )
    return choose(zo, optimizer, probes, zo.forward_passes - before, steps, default)


def choose(
    zo: ZerothOrder, optimizer: Optimizer, probes: LossProbes, forward_passes: int, steps: float, default: float
) -> FoundRate:
    """The rate that what was measured stands for; see `find_learning_rate`."""
    directions = zo.estimator.num_directions
    curvature, curvature_error = probes.curvature
    numbers = (probes.loss, probes.slope_square, curvature, curvature_error)
    if not all(map(math.isfinite, numbers)) or probes.slope_square <= 0 or curvature <= 0:
        doubt = (
            "the loss is not finite or did not rise along any direction, so there is nothing to find a learning rate from; "
            "the default is used."
        )
        return FoundRate(default, probes, forward_passes, {}, math.nan, math.nan, (doubt,))

    unit = _unit(zo, optimizer, probes)
    gradient_square, error = probes.gradient_square
    gradient_square = min(max(gradient_square, 0.0) + 2 * error, probes.slope_square)
    descent = directions / (curvature + (directions + 1) * probes.largest_curvature)
    distance = math.sqrt(2 * RISE * abs(probes.loss) / (curvature + curvature_error))
    furthest = max(probe.distance for probe in probes.range)
    step = math.sqrt(probes.batch_variance * steps / directions)
    rate_of_distance = unit / step if step else math.inf
    bounds = {
        "noise": WALK * min(distance, furthest) * rate_of_distance,
        "mini-batch": unit * descent * gradient_square / probes.slope_square,
        "curvature": unit * descent,
    }
    # Of a mean of squares of normal numbers, and of a sum of rises; a rate goes with the square root of either.
    directions_seen = len(probes.slopes) + len(probes.range)
    variance = 2 / directions_seen + (1 - probes.common) ** 2 * 2 / (len(probes.slopes) + SLOPES_BEFORE)
    deviation = math.sqrt(variance + (curvature_error / curvature) ** 2) / 2
    factor = math.exp(deviation)
    doubts = []
    if factor > UNSURE**0.5:
        doubts.append(f"the probes disagree, so the rate may be off by a factor of {factor**2:.1f}.")
    if distance > 2 * furthest:
        doubts.append(f"the loss did not rise by {RISE:.0%} as far as the probes went.")
    return FoundRate(min(bounds.values()), probes, forward_passes, bounds, rate_of_distance, factor, tuple(doubts))


def _unit(zo: ZerothOrder, optimizer: Optimizer, probes: LossProbes) -> float:
    """What a rate of plain SGD on slopes is multiplied by to mean the same to this optimizer."""
    length = math.sqrt(probes.slope_square)
    unit = length if zo.rule.divides_scale_out or zo.normalisation is not None else 1.0
    if isinstance(optimizer, torch.optim.Adam):
        return length / math.sqrt(zo.estimator.num_directions)
    group = optimizer.param_groups[0]
    momentum = group.get("momentum", 0.0)
    return unit * (1 - momentum) / (1 - group.get("dampening", 0.0) if momentum else 1.0)
