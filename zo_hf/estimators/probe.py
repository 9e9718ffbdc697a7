"""Probes, the evaluations that a step asks for, and the error of a model that cannot evaluate several at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """A request for one number at ξ + scale · z: the loss there, or its derivative along z.

    Args:
        direction: index of z within the step. If it is negative, the point is ξ - scale · η · ĝ instead: `scale` steps
            of SGD along the gradient that the coordinates hold. `CoordinateBlocks.set_learning_rates` gives η.
        scale: signed distance along z, e.g. +ε or -ε; 0 is the current point itself.
        derivative: True asks for ∇L · z instead of L. The probe before it must ask for L at the same point: one
            forward pass with tangents gives both, at the cost of two passes.
        at_snapshot: True starts from the coordinates' last snapshot (`CoordinateBlock.take_snapshot`) instead of from
            ξ.
    """

    direction: int
    scale: float
    derivative: bool = False
    at_snapshot: bool = False


class NotBatchable(RuntimeError):
    """Raised if the model or its loss cannot evaluate several probes in one forward pass; the message says why."""
