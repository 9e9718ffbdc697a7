"""Forward differences that share one clean loss (Nesterov and Spokoiny 2017, "Random gradient-free minimization").

    cᵢ = (L(ξ + ε·zᵢ) - L(ξ)) / ε        ĝ = 1/q · Σᵢ cᵢ · zᵢ

Cost: q + 1 forward passes. L(ξ) is evaluated once per step and is the loss that is logged. On a quadratic, c has an
error of ε/2 · zᵀHz, whereas a two-point estimate is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

from zo_hf.estimators.estimator import Estimator
from zo_hf.estimators.probe import Probe
from zo_hf.method_info import Method


class OneSided(Estimator):
    """Forward differences along `num_directions` random directions."""

    name = "one_sided"
    about = Method("RGF (Nesterov and Spokoiny 2017)", forwards="q + 1")

    def probes(self) -> list[Probe]:
        """Return the q + 1 evaluations of a step, the clean one first."""
        return [Probe(0, 0.0), *(Probe(i, self.eps) for i in range(self.num_directions))]

    def projected_gradients(self, losses: Sequence[float]) -> list[float]:
        clean, *moved = losses
        return [(loss - clean) / self.eps for loss in moved]

    def loss(self, losses: Sequence[float]) -> float:
        """Return the clean loss."""
        return losses[0]
