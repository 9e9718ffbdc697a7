"""What a probe is, and what the forward pass of a module needs to know about the probes it is part of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """One evaluation of the loss at ξ + scale · z.

    Args:
        direction: index of z within the step; with a negative one the point is ξ - scale · η · ĝ, a multiple of the step
            of plain SGD along the gradient that the coordinates hold, see `Materialised.set_learning_rates`.
        scale: signed distance along z, e.g. +ε or -ε; 0 is the current point itself.
    """

    direction: int
    scale: float


class NotBatchable(RuntimeError):
    """The model, or its loss, cannot evaluate several probes in one forward pass; the message says why."""
