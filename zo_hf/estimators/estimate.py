"""The records of a step: the result of its probes, and the numbers that a replay needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """The result of one step's probes.

    Args:
        loss: the loss at the current point if the estimator evaluates it, else the mean over the probes.
        projected_gradients: c of every direction.
        is_finite: False if a loss or a c is not finite; the optimizer then gets nothing to apply.
        curvatures: zᵀHz of the measured directions, see `CurvatureProbes`; empty in most steps.
    """

    loss: float
    projected_gradients: tuple[float, ...]
    is_finite: bool
    curvatures: tuple[float, ...] = ()


@dataclass(frozen=True)
class Step:
    """The numbers behind one optimizer step: together with the seed, everything that a replay needs.

    Args:
        step: number of the step, from 0.
        projected_gradients: c of every direction, before any normalization. The estimator's other numbers follow, then
            the rule's choice; see `ZerothOrder.numbers`.
        skipped: True if the optimizer got nothing to apply.
        learning_rates: learning rate of every parameter group.
        clip_factor: factor by which the estimate was multiplied before the optimizer got it.
        begins: names of the parameters that did not move before this step, because no probe had read them.
    """

    step: int
    projected_gradients: tuple[float, ...]
    skipped: bool
    learning_rates: tuple[float, ...]
    clip_factor: float
    begins: tuple[str, ...] = ()
