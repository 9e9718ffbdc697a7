"""Central differences with the clean loss between them (HiZOO, Zhao et al., arXiv 2402.15173, algorithm 1).

    cᵢ = (L(ξ + ε·zᵢ) - L(ξ - ε·zᵢ)) / 2ε
    κᵢ = (L(ξ + ε·zᵢ) + L(ξ - ε·zᵢ) - 2·L(ξ)) / ε²          = zᵢᵀ∇²L zᵢ up to O(ε²): the curvature along zᵢ

Cost: 2q + 1 forward passes, the clean loss being the same for all directions. κ carries a rounding error of about
(the losses' last place)·L/ε², so the losses have to be float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence

from zo_hf.estimators.estimator import Estimator
from zo_hf.method import Method
from zo_hf.probes.probe import Probe


class SecondDifference(Estimator):
    """A step's numbers are c of every direction, and then κ of every direction."""

    name = "second_difference"
    about = Method("HiZOO (2402.15173)", forwards="2q + 1")

    @property
    def numbers(self) -> int:
        return 2 * self.num_directions

    def probes(self) -> list[Probe]:
        """The clean loss, then + and - of every direction."""
        around = [Probe(i, sign * self.eps) for i in range(self.num_directions) for sign in (1.0, -1.0)]
        return [Probe(0, 0.0), *around]

    def projected_gradients(self, losses: Sequence[float]) -> list[float]:
        clean, around = losses[0], list(zip(losses[1::2], losses[2::2], strict=True))
        slopes = [(plus - minus) / (2.0 * self.eps) for plus, minus in around]
        return [*slopes, *(((plus - clean) + (minus - clean)) / self.eps**2 for plus, minus in around)]

    def loss(self, losses: Sequence[float]) -> float:
        """The clean one."""
        return losses[0]

    def coefficients(self, projected_gradients: Sequence[float]) -> list[float]:
        return super().coefficients(projected_gradients[: self.num_directions])

    def curvatures(self, projected_gradients: Sequence[float]) -> Sequence[float]:
        """κ of every direction, from what `projected_gradients` returned."""
        return projected_gradients[self.num_directions :]
