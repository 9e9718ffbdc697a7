"""The central two-point estimator (SPSA; Spall 1992, and Malladi et al., arXiv 2305.17333, definition 1).

    cᵢ = (L(ξ + ε·zᵢ) - L(ξ - ε·zᵢ)) / 2ε        ĝ = 1/q · Σᵢ cᵢ · zᵢ

Cost: 2q forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence

from zo_hf.estimators.estimator import Estimator
from zo_hf.estimators.probe import Probe
from zo_hf.method_info import Method


class TwoPoint(Estimator):
    """Central differences along `num_directions` random directions."""

    name = "two_point"
    about = Method("SPSA (Spall 1992); MeZO (2305.17333)", forwards="2q")

    def probes(self) -> list[Probe]:
        """Return the 2q evaluations of a step, + and - of a direction side by side."""
        return [Probe(i, sign * self.eps) for i in range(self.num_directions) for sign in (1.0, -1.0)]

    def projected_gradients(self, losses: Sequence[float]) -> list[float]:
        return [(plus - minus) / (2.0 * self.eps) for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
