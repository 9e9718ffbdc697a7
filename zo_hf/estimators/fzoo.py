"""FZOO (Dang et al., arXiv 2506.09034): forward differences, divided by the standard deviation of the step's losses.

    lᵢ = L(ξ + ε·uᵢ),  l₀ = L(ξ)        cᵢ = (lᵢ - l₀) / (ε·σ)        ĝ = 1/q · Σᵢ cᵢ · uᵢ
    σ² = 1/(q - 1) · Σᵢ (lᵢ - l̄)²       of the q perturbed losses, as they are after all micro-batches and ranks

On a linear loss E[σ²] = ε²·|∇L|², so σ is about ε·|∇L|, and for any scale of the loss a step is one of normalized SGD.
The paper's u are Rademacher (`zo_direction`). Each c is about 1/ε, so the learning rate is ε times the length of a
step per coordinate (times √q). Its default here is ε times that of the subspace. If all perturbed losses are equal, c
is 0.

If groups of rows have directions of their own, σ² is the sum of σ_g² over groups, each around the mean of its own
losses. So σ compares only what the directions changed, not a hard row with an easy one. All groups share σ: divided by
its own, every row would pull as hard as any other, and ĝ would not point along ∇L. With Σ_g |∇ℓ_g|² for |∇L|² in σ, a
step is as long as with one group.

Cost: q + 1 forward passes; q must be at least 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from zo_hf.estimators.one_sided import OneSided
from zo_hf.method_info import Method


class FZOO(OneSided):
    """Forward differences in units of the losses' standard deviation."""

    name = "fzoo"
    about = Method("FZOO (2506.09034)", forwards="q + 1", needs="q at least 2; meant for zo_direction='rademacher'")
    least_directions = 2
    is_scale_free = True

    def projected_gradients(self, losses: Sequence[float]) -> list[float]:
        return self.numbers_of_groups([losses])

    def numbers_of_groups(self, losses: Sequence[Sequence[float]]) -> list[float]:
        deviation = math.hypot(*(standard_deviation(moved, len(moved) - 1) for _, *moved in losses))
        changes = [loss - clean for clean, *moved in losses for loss in moved]
        return [change / deviation / self.eps if deviation != 0.0 else 0.0 for change in changes]

    def learning_rate(self, subspace_default: float) -> float:
        return subspace_default * self.eps


def standard_deviation(losses: Sequence[float], divisor: int) -> float:
    """Return √(Σ (l - l̄)² / divisor): exactly 0 if all losses are equal, and not finite if one of them is not."""
    if all(loss == losses[0] for loss in losses):
        return 0.0  # even the mean of equal numbers may be rounded
    mean = sum(losses) / len(losses)
    return math.hypot(*(loss - mean for loss in losses)) / divisor**0.5
