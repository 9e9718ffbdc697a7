"""Central differences with the clean loss between them (HiZOO, Zhao et al., arXiv 2402.15173, algorithm 1).

    cᵢ = (L(ξ + ε·zᵢ) - L(ξ - ε·zᵢ)) / 2ε
    κᵢ = (L(ξ + ε·zᵢ) + L(ξ - ε·zᵢ) - 2·L(ξ)) / ε²          = zᵢᵀ∇²L zᵢ up to O(ε²): the curvature along zᵢ

If groups of rows have directions of their own, κ of a group belongs to its share ℓ_g of the loss: κ = zᵀ∇²ℓ_g z. The
shares' Hessians add up to ∇²L, so the sum of κ over groups has the mean that κ of the whole loss has, tr ∇²L.

Cost: 2q + 1 forward passes; all directions share the clean loss. κ has a rounding error of about
(the losses' last place)·L/ε², so the losses must be at least float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from zo_hf.estimators.estimator import Estimator
from zo_hf.estimators.probe import Probe
from zo_hf.method_info import Method


class SecondDifference(Estimator):
    """Central differences and curvatures: the numbers of a step are all c, followed by all κ in the same order."""

    name = "second_difference"
    about = Method("HiZOO (2402.15173)", forwards="2q + 1")

    @property
    def numbers(self) -> int:
        return 2 * self.num_directions

    def probes(self) -> list[Probe]:
        """Return the 2q + 1 evaluations of a step: the clean one, then + and - of every direction."""
        around = [Probe(i, sign * self.eps) for i in range(self.num_directions) for sign in (1.0, -1.0)]
        return [Probe(0, 0.0), *around]

    def projected_gradients(self, losses: Sequence[float]) -> list[float]:
        clean, around = losses[0], list(zip(losses[1::2], losses[2::2], strict=True))
        slopes = [(plus - minus) / (2.0 * self.eps) for plus, minus in around]
        return [*slopes, *(((plus - clean) + (minus - clean)) / self.eps**2 for plus, minus in around)]

    def loss(self, losses: Sequence[float]) -> float:
        """Return the clean loss."""
        return losses[0]

    def coefficients(self, projected_gradients: Sequence[float]) -> list[float]:
        return super().coefficients(projected_gradients[: len(projected_gradients) // 2])

    def curvatures(self, projected_gradients: Sequence[float]) -> Sequence[float]:
        """Return κ of every direction, out of a step's numbers."""
        return projected_gradients[len(projected_gradients) // 2 :]
