"""What a probe is, and what the forward pass of a module needs to know about the probes it is part of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """One number asked for at ξ + scale · z: the loss there, or its derivative along z.

    Args:
        direction: index of z within the step; with a negative one the point is ξ - scale · η · ĝ, a multiple of the step
            of plain SGD along the gradient that the coordinates hold, see `Materialised.set_learning_rates`.
        scale: signed distance along z, e.g. +ε or -ε; 0 is the current point itself.
        derivative: ask for ∇L · z in place of L. It is evaluated together with the probe before it, which asks for L at the
            same point: one forward pass with tangents gives both, at the cost of two.
        at_snapshot: go from where the coordinates were when the rule last took note of them, instead of from ξ.
    """

    direction: int
    scale: float
    derivative: bool = False
    at_snapshot: bool = False


class NotBatchable(RuntimeError):
    """The model, or its loss, cannot evaluate several probes in one forward pass; the message says why."""
