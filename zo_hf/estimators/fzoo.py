"""FZOO (Dang et al., arXiv 2506.09034): forward differences, divided by the standard deviation of the step's losses.

    lᵢ = L(ξ + ε·uᵢ),  l₀ = L(ξ)        cᵢ = (lᵢ - l₀) / (ε·σ)        ĝ = 1/q · Σᵢ cᵢ · uᵢ
    σ² = 1/(q - 1) · Σᵢ (lᵢ - l̄)²       of the q perturbed losses, as they are after all micro-batches and ranks

σ is about ε·|∇L|, since E[σ²] = ε²·|∇L|² on a linear loss: the step is that of normalised SGD, whatever the loss's scale.
The paper's u are Rademacher (`zo_direction`). Each c is about 1/ε, so the learning rate is ε times the length of a step
per coordinate (times √q); its default here is ε times the subspace's. Where all perturbed losses are equal c is 0.

Cost: q + 1 forward passes, q at least 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from zo_hf.estimators.one_sided import OneSided
from zo_hf.method import Method


class FZOO(OneSided):
    """Forward differences in units of the losses' standard deviation."""

    name = "fzoo"
    about = Method(
        "FZOO (2506.09034)", forwards="q + 1", needs="q of at least 2; meant with zo_direction='rademacher'"
    )
    least_directions = 2
    is_scale_free = True

    def projected_gradients(self, losses: Sequence[float]) -> list[float]:
        clean, *moved = losses
        deviation = standard_deviation(moved, len(moved) - 1)
        return [(loss - clean) / deviation / self.eps if deviation != 0.0 else 0.0 for loss in moved]

    def learning_rate(self, of_the_subspace: float) -> float:
        return of_the_subspace * self.eps


def standard_deviation(losses: Sequence[float], divisor: int) -> float:
    """√(Σ (l - l̄)² / divisor); exactly 0 where all are equal, and not finite where one is not."""
    if all(loss == losses[0] for loss in losses):
        return 0.0  # their rounded mean may be another number
    mean = sum(losses) / len(losses)
    return math.hypot(*(loss - mean for loss in losses)) / divisor**0.5
