"""The LR finder: from forward passes before training, it finds the learning rate with the lowest predicted final loss.

The probes are in `loss_probes.py`, the prediction is in `predicted_loss.py`, and the conversion of a rate to the units
of an optimizer is in `optimizer_units.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch.optim import Optimizer

from zo_hf.engine import ZerothOrder
from zo_hf.lr_finder.loss_probes import EVALUATIONS, TARGET_RISE, LossProbes, probe_loss
from zo_hf.lr_finder.optimizer_units import check_findable, divides_scale_out, unit_of_rate
from zo_hf.lr_finder.predicted_loss import (
    CONSTANT,
    Posterior,
    Schedule,
    candidate_rates,
    posterior_of,
    predicted_losses,
    weighted_quantiles,
)
from zo_hf.lr_finder.step_groups import Batch, groups_of_step
from zo_hf.subspaces import Adapter

#: The largest fraction of a run's forward passes that the search may take.
SHARE = 0.05
#: Bounds on the number of loss evaluations of a search. Fewer carry no information, and more add little.
MIN_EVALUATIONS, MAX_EVALUATIONS = 20, 200
#: A rate with a larger standard error than this factor gets a warning.
UNCERTAIN_FACTOR = 3.0
#: The warning for LoRA and similar adapters, where one factor is 0 and the loss is far from a parabola.
ADAPTER_WARNING = (
    "adapter weights that start at 0, as LoRA's do, change the curvature as soon as they move, so this rate is a tenth to a "
    "third of the best; try three times this rate."
)
#: Slopes that shrink by more than the exponential of this get a warning.
BENT = 1.0
#: A run gets a warning if its loss is not predicted to fall by this fraction.
MIN_IMPROVEMENT = 0.02


@dataclass(frozen=True)
class Prediction:
    """The predicted final losses of runs with other rates.

    Attributes:
        rates: learning rates in the optimizer's units, ascending.
        losses: the mean predicted final loss for each rate; a diverged run counts as `DIVERGED` times the initial
            loss.
        low, high: the 10 % and 90 % quantiles of the predicted final loss for each rate.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class LRFinderResult:
    """The result of a search: a learning rate, with the measurements and the prediction behind it.

    Attributes:
        learning_rate: the rate to give to the optimizer.
        probes: the measurements; None if nothing was measured.
        forward_passes: the number of forward passes that the search took.
        prediction: the predicted losses, lowest at `learning_rate`; None if the search fell back to the default rate.
        factor: one standard error of the rate, as a factor in either direction.
        warnings: reasons why the rate is uncertain, one sentence each; empty if there are none.
        groups: the number of groups of rows with directions of their own in a step, for which the rate is.
    """

    learning_rate: float
    probes: LossProbes | None
    forward_passes: int
    prediction: Prediction | None
    factor: float
    warnings: tuple[str, ...]
    groups: int = 1


def forward_passes_of_search(allowed: int, micro_batches: int) -> int:
    """Return the exact number of forward passes that the probes take out of `allowed`; 0 if `allowed` is too small."""
    within = min(allowed // micro_batches, MAX_EVALUATIONS)
    return within // EVALUATIONS * EVALUATIONS * micro_batches if within >= MIN_EVALUATIONS else 0


def find_learning_rate(
    zo: ZerothOrder,
    optimizer: Optimizer,
    draw: Callable[[], Batch],
    forward_passes: int,
    steps: float,
    default: float,
    schedule: Schedule = CONSTANT,
) -> LRFinderResult:
    """Probe the loss and choose a learning rate; the model, the optimizer and the engine's step do not change.

    Args:
        zo: the engine, before its first step.
        optimizer: the optimizer that was passed to `zo.prepare`.
        draw: returns a new batch of the run at every call, always with the same number of micro-batches.
        forward_passes: the number of forward passes that the probes may take; see also `groups_of_step`.
        steps: the number of steps of the run.
        default: the rate to return if the search finds none.
        schedule: the multiples of the rate over the course of the run.

    Raises:
        ValueError: see `check_findable`.
    """
    check_findable(zo, optimizer)
    first = draw()
    taken = forward_passes_of_search(forward_passes, len(first))
    if not taken:
        warning = (
            f"{forward_passes} forward passes are too few to find a learning rate, which takes at least "
            f"{MIN_EVALUATIONS * len(first)}; the default is used."
        )
        return LRFinderResult(default, None, 0, None, math.nan, (warning,))
    before, ready = zo.forward_passes, [first]
    groups = groups_of_step(zo, first)
    probes = probe_loss(zo, lambda: ready.pop() if ready else draw(), taken // len(first) // EVALUATIONS, groups)
    return choose(zo, optimizer, probes, zo.forward_passes - before, steps, default, schedule, groups)


def choose(
    zo: ZerothOrder,
    optimizer: Optimizer,
    probes: LossProbes,
    forward_passes: int,
    steps: float,
    default: float,
    schedule: Schedule = CONSTANT,
    groups: int = 1,
) -> LRFinderResult:
    """Choose the learning rate with the lowest predicted final loss.

    Args:
        probes: the measurements.
        forward_passes: the number of forward passes that the search took.
        groups: the number of groups of rows with directions of their own in a step.
        zo, optimizer, steps, default, schedule: as for `find_learning_rate`.
    """
    reason = _reason_for_default(probes, schedule)
    if reason:
        said = f"{reason}; the default is used."
        return LRFinderResult(default, probes, forward_passes, None, math.nan, (said,), groups)
    posterior = posterior_of(probes, zo.estimator.num_directions, groups)
    rates = candidate_rates(posterior, schedule)
    fractions = predicted_losses(posterior, rates, steps, schedule, fixed_length=divides_scale_out(zo, optimizer))
    mean = fractions @ posterior.weight
    best = int(mean.argmin())
    best_of_each = np.log(rates[fractions.argmin(axis=0)])
    factor = math.exp(math.sqrt(posterior.weight @ (best_of_each - posterior.weight @ best_of_each) ** 2))
    own_rates = tuple((rates * unit_of_rate(zo, optimizer, probes.slope_square, groups)).tolist())
    losses = np.stack([mean, *weighted_quantiles(fractions, posterior.weight, (0.1, 0.9))]) * probes.loss
    prediction = Prediction(own_rates, *map(tuple, losses.tolist()))
    warnings = _warnings_about(probes, posterior, factor, float(mean[best]), best in (0, len(rates) - 1))
    if isinstance(zo.subspace, Adapter) and not all(tensor.any() for tensor in zo.subspace.coordinates.values()):
        warnings = (*warnings, ADAPTER_WARNING)
    return LRFinderResult(own_rates[best], probes, forward_passes, prediction, factor, warnings, groups)


def _reason_for_default(probes: LossProbes, schedule: Schedule) -> str | None:
    """Return the reason why the measurements determine no rate, or None if they do."""
    curvature, error = probes.curvature
    if not math.isfinite(probes.loss) or not math.isfinite(probes.slope_square):
        return "the loss is not finite"
    if probes.noise_square is not None and not math.isfinite(probes.noise_square[0]):
        return "the losses of the rows of a batch are too different to compare"
    if min(line.loss for line in probes.lines) <= 0:
        return "the loss of a batch is not positive, so a relative improvement of it is not defined"
    if probes.slope_square <= 0:
        return "the loss has no slope along the probed directions"
    if curvature <= 0:
        return "the loss did not rise along the probed directions, so it sets no limit on the learning rate"
    if not math.isfinite(curvature) or not math.isfinite(error):
        return "the loss was too large wherever it was probed"
    if not any(square for _, square in schedule):
        return "the schedule multiplies the learning rate by 0 throughout"
    return None


def _warnings_about(
    probes: LossProbes, posterior: Posterior, factor: float, remaining: float, at_the_end: bool
) -> tuple[str, ...]:
    """Return the reasons why a rate is uncertain.

    Args:
        probes: the measurements.
        posterior: the distribution derived from them.
        factor: one standard error of the rate, as a factor.
        remaining: the fraction of the loss that is predicted to remain with this rate.
        at_the_end: True if the rate is the smallest or the largest candidate.
    """
    curvature, error = probes.curvature
    warnings = []
    if factor > UNCERTAIN_FACTOR:
        warnings.append(f"the probes determine the rate only to within a factor of {factor:.1f}.")
    if error >= curvature:
        warnings.append("the differences between batches hide how much the loss rises far along a direction.")
    if probes.bend > BENT:
        warnings.append(
            f"slopes shrink to 1/{math.exp(probes.bend):.2g} within the distance of the probes, so the loss is no parabola, "
            "and its curvature may differ by as much where the steps go."
        )
    if posterior.inconsistent:
        warnings.append("the slopes are larger than those of any quadratic with this loss and curvature.")
    if at_the_end:
        warnings.append("the best rate is outside the range of candidates.")
    if remaining > 1 - MIN_IMPROVEMENT:
        common = posterior.weight @ (posterior.gradient / (posterior.gradient + posterior.noise))
        warnings.append(
            f"a run of this length is not expected to lower the loss by {MIN_IMPROVEMENT:.0%}; use more steps"
            + (", or larger batches, because their gradients have little in common." if common < 0.1 else ".")
        )
    furthest = max(line.distance for line in probes.lines)
    if math.sqrt(2 * TARGET_RISE * probes.loss / curvature) > 2 * furthest:
        warnings.append(f"the loss did not rise by {TARGET_RISE:.0%} within the distance of the probes.")
    return tuple(warnings)
