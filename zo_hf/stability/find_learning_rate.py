"""A learning rate from forward passes before training: the one whose predicted final loss is least.

The probes are in `loss_probes.py`, the prediction in `predicted_loss.py`, and what the rate means to an optimizer in
`rate_of_optimizer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch.optim import Optimizer

from zo_hf.stability.loss_probes import EVALUATIONS, RISE, Batch, LossProbes, probe_loss
from zo_hf.stability.predicted_loss import (
    CONSTANT,
    Posterior,
    Schedule,
    posterior_of,
    predicted_losses,
    quantiles,
    rates_to_look_at,
)
from zo_hf.stability.rate_of_optimizer import check_findable, divides_scale_out, unit_of_rate
from zo_hf.subspaces import Adapter
from zo_hf.zeroth_order import ZerothOrder

#: Of a run's forward passes, what the search may take.
SHARE = 0.05
#: Evaluations of a batch's loss, at least and at most: fewer say nothing, and more say little more.
LEAST_EVALUATIONS, MOST_EVALUATIONS = 20, 200
#: A rate that may be further off than by this factor is not sure.
UNSURE = 3.0
#: What is said of LoRA and the like: a factor that is 0 beside a small one makes the loss anything but a parabola.
BENT = (
    "weights of the adapter that are 0, as LoRA's, bend the loss as soon as they move, and rates are found a third to a tenth "
    "of the best; try three times as much."
)
#: A run that is not predicted to lose this part of its loss may as well not be begun.
LITTLE = 0.02


@dataclass(frozen=True)
class Prediction:
    """What runs with other rates would end with.

    Attributes:
        rates: in the optimizer's units, ascending.
        losses: predicted final losses, of as many runs; one that is lost counts as `LOST` times the first loss.
        low, high: one in ten is below, and above.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class FoundRate:
    """A learning rate, and what it comes from.

    Attributes:
        learning_rate: to be given to the optimizer.
        probes: what was measured; None where nothing was.
        forward_passes: what that took.
        prediction: whose least loss is at the rate; None where nothing was found.
        factor: by which the rate may be off either way, one standard error.
        doubts: why it is not sure, in sentences; empty if it is.
    """

    learning_rate: float
    probes: LossProbes | None
    forward_passes: int
    prediction: Prediction | None
    factor: float
    doubts: tuple[str, ...]


def forward_passes_of_search(allowed: int, micro_batches: int) -> int:
    """What a search takes of the forward passes it is allowed, exactly; 0 if they are too few for any."""
    within = min(allowed // micro_batches, MOST_EVALUATIONS)
    return within // EVALUATIONS * EVALUATIONS * micro_batches if within >= LEAST_EVALUATIONS else 0


def find_learning_rate(
    zo: ZerothOrder,
    optimizer: Optimizer,
    draw: Callable[[], Batch],
    forward_passes: int,
    steps: float,
    default: float,
    schedule: Schedule = CONSTANT,
) -> FoundRate:
    """Probe the loss and choose; the model, the optimizer and the engine's step stay as they are.

    Args:
        zo: the engine, before its first step.
        optimizer: what `zo.prepare` was given.
        draw: a new batch at every call, one of a step of the run, always of as many micro-batches.
        forward_passes: what the search may take.
        steps: of the run.
        default: the rate where nothing can be found.
        schedule: what the rate is multiplied by in the course of the run.

    Raises:
        ValueError: see `check_findable`.
    """
    check_findable(zo, optimizer)
    first = draw()
    taken = forward_passes_of_search(forward_passes, len(first))
    if not taken:
        doubt = (
            f"{forward_passes} forward passes are too few to find a learning rate with, which takes "
            f"{LEAST_EVALUATIONS * len(first)}; the default is used."
        )
        return FoundRate(default, None, 0, None, math.nan, (doubt,))
    before, ready = zo.forward_passes, [first]
    probes = probe_loss(zo, lambda: ready.pop() if ready else draw(), taken // len(first) // EVALUATIONS)
    return choose(zo, optimizer, probes, zo.forward_passes - before, steps, default, schedule)


def choose(
    zo: ZerothOrder,
    optimizer: Optimizer,
    probes: LossProbes,
    forward_passes: int,
    steps: float,
    default: float,
    schedule: Schedule = CONSTANT,
) -> FoundRate:
    """The rate that what was measured stands for.

    Args:
        probes: what was measured.
        forward_passes: what that took.

    For the other arguments see `find_learning_rate`.
    """
    why_not = _why_not(probes, schedule)
    if why_not:
        return FoundRate(default, probes, forward_passes, None, math.nan, (f"{why_not}; the default is used.",))
    posterior = posterior_of(probes, zo.estimator.num_directions)
    rates = rates_to_look_at(posterior, schedule)
    parts = predicted_losses(posterior, rates, steps, schedule, fixed_length=divides_scale_out(zo, optimizer))
    mean = parts @ posterior.weight
    best = int(mean.argmin())
    of_each = np.log(rates[parts.argmin(axis=0)])
    factor = math.exp(math.sqrt(posterior.weight @ (of_each - posterior.weight @ of_each) ** 2))
    own_rates = tuple((rates * unit_of_rate(zo, optimizer, probes.slope_square)).tolist())
    seen = np.stack([mean, *quantiles(parts, posterior.weight, (0.1, 0.9))]) * probes.loss
    prediction = Prediction(own_rates, *map(tuple, seen.tolist()))
    doubts = _doubts(probes, posterior, factor, float(mean[best]), best in (0, len(rates) - 1))
    if isinstance(zo.subspace, Adapter) and not all(tensor.any() for tensor in zo.subspace.coordinates.values()):
        doubts = (*doubts, BENT)
    return FoundRate(own_rates[best], probes, forward_passes, prediction, factor, doubts)


def _why_not(probes: LossProbes, schedule: Schedule) -> str | None:
    """Why there is nothing to find a rate from, or None."""
    curvature, error = probes.curvature
    if not math.isfinite(probes.loss) or not math.isfinite(probes.slope_square):
        return "the loss is not finite"
    if min(line.loss for line in probes.lines) <= 0:
        return "the loss of a batch is not positive, and what part of it a run loses cannot be said"
    if probes.slope_square <= 0:
        return "the loss has no slope along the directions that were probed"
    if curvature <= 0:
        return "the loss did not rise along the directions that were probed, so there is nothing to find a learning rate from"
    if not math.isfinite(curvature) or not math.isfinite(error):
        return "the loss was too large wherever it was probed"
    if not any(square for _, square in schedule):
        return "the schedule multiplies the learning rate by 0 throughout"
    return None


def _doubts(probes: LossProbes, posterior: Posterior, factor: float, part: float, at_the_end: bool) -> tuple[str, ...]:
    """What is not sure about a rate with which `part` of the loss is expected to be left."""
    curvature, error = probes.curvature
    doubts = []
    if factor > UNSURE:
        doubts.append(f"the probes leave much open, so the rate may be off by a factor of {factor:.1f}.")
    if error >= curvature:
        doubts.append("how much the loss rises far along a direction is lost in the differences between batches.")
    if posterior.at_odds:
        doubts.append("the slopes are larger than those of any quadratic with this loss and curvature.")
    if at_the_end:
        doubts.append("the best rate is outside of those that were looked at.")
    if part > 1 - LITTLE:
        common = posterior.weight @ (posterior.gradient / (posterior.gradient + posterior.noise))
        doubts.append(
            f"a run of so many steps is not expected to lower the loss by {LITTLE:.0%}; more steps would help"
            + (", or larger batches, as they differ by much more than they have in common." if common < 0.1 else ".")
        )
    furthest = max(line.distance for line in probes.lines)
    if math.sqrt(2 * RISE * probes.loss / curvature) > 2 * furthest:
        doubts.append(f"the loss did not rise by {RISE:.0%} as far as the probes went.")
    return tuple(doubts)
