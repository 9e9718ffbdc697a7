"""Finite differences along single coordinates (Kiefer and Wolfowitz 1952; CGE in DeepZero, arXiv 2310.02025).

    central:   cᵢ = (L(ξ + ε·e_k) - L(ξ - ε·e_k)) / 2ε        2B forward passes
    forward:   cᵢ = (L(ξ + ε·e_k) - L(ξ)) / ε                 B + 1: one clean loss for all
               ĝ = Σᵢ cᵢ · e_k                                k from `UnitVectors`, B = num_directions

Up to the curvature along e_k, cᵢ is one entry of the gradient, so ĝ is a sum and not a mean. Without a rule
(`zo_rule="none"`) the method is block cyclic coordinate descent: a step moves the B coordinates that it has measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from zo_hf.estimators.probe import Probe
from zo_hf.estimators.two_point import TwoPoint
from zo_hf.method_info import Method

_NEEDS = "coordinates in memory; one cycle takes d/q steps"


class Coordinate(TwoPoint):
    """Central differences along `num_directions` coordinates; every step takes the next ones."""

    name = "coordinate"
    about = Method("coordinate differences (Kiefer-Wolfowitz 1952, 2310.02025)", forwards="2q", needs=_NEEDS)
    along_coordinates = True

    def coefficients(self, projected_gradients: Sequence[float]) -> list[float]:
        return list(projected_gradients)


class CoordinateForward(Coordinate):
    """Forward differences, with half the evaluations and an error of order ε instead of ε²."""

    name = "coordinate_forward"
    about = Method("coordinate differences, forward (Kiefer-Wolfowitz 1952)", forwards="q + 1", needs=_NEEDS)

    def probes(self) -> list[Probe]:
        """Return the B + 1 evaluations of a step, the clean one first."""
        return [Probe(0, 0.0), *(Probe(i, self.eps) for i in range(self.num_directions))]

    def projected_gradients(self, losses: Sequence[float]) -> list[float]:
        clean, *moved = losses
        return [(loss - clean) / self.eps for loss in moved]
