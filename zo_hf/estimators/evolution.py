"""Evolution strategies: antithetic pairs, scored by the ranks or the z-scores of their losses within the step.

    sᵢ± = score of L(ξ ± ε·zᵢ) among the 2q losses of the step        cᵢ = (sᵢ₊ - sᵢ₋) / 2        ĝ = 1/q · Σᵢ cᵢ · zᵢ

    evolution        s = (l - l̄) / σ        z-scores, σ² = 1/2q · Σ (l - l̄)²  (Qiu et al., arXiv 2509.24372)
    evolution_ranks  s = rank(l)/(2q-1) - ½  centered ranks, equal losses share the mean of theirs (Salimans et al., arXiv
                                             1703.03864; Wierstra et al., "Natural evolution strategies", 2014)

ĝ is the mean over the 2q members of s times the member's own ±z. As in 2509.24372, the learning rate contains the
factor 1/ε of 1703.03864. It is therefore about the length of a step per coordinate (times √q).

Scaling or shifting the loss does not change z-scores, and applying any increasing function to it does not change
ranks. The loss may therefore be any number to minimize, e.g. minus a reward. If all losses are equal, c is 0. In the
low_rank subspace the members share one forward pass, as in EGGROLL (arXiv 2511.16652).

If groups of rows have directions of their own, z-scores are taken within each group, l̄_g, but with one σ for all:
σ² = Σ_g σ_g², see `fzoo`. Ranks have no such form. Among all rows, they would tell hard rows from easy ones. Within a
group, they forget how much its loss has changed, so ĝ would not point along ∇L.

Cost: 2q forward passes; q must be at least 2.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import ClassVar

from zo_hf.estimators.fzoo import standard_deviation
from zo_hf.estimators.two_point import TwoPoint
from zo_hf.method_info import Method


class Evolution(TwoPoint):
    """Antithetic pairs, scored by z-scores."""

    name = "evolution"
    aliases: ClassVar[tuple[str, ...]] = ("es",)
    about = Method("ES at scale (2509.24372), EGGROLL (2511.16652)", forwards="2q", needs="q at least 2")
    least_directions = 2
    is_scale_free = True

    def projected_gradients(self, losses: Sequence[float]) -> list[float]:
        return self.numbers_of_groups([losses])

    def numbers_of_groups(self, losses: Sequence[Sequence[float]]) -> list[float]:
        deviation = math.hypot(*(standard_deviation(group, len(group)) for group in losses))
        return [c for group in losses for c in _of_pairs(_z_scores(group, deviation))]


class EvolutionRanks(TwoPoint):
    """Antithetic pairs, scored by centered ranks."""

    name = "evolution_ranks"
    about = Method("OpenAI-ES (1703.03864)", forwards="2q", needs="q at least 2")
    least_directions = 2
    is_scale_free = True

    def projected_gradients(self, losses: Sequence[float]) -> list[float]:
        return _of_pairs(self.scores(losses))

    def scores(self, losses: Sequence[float]) -> list[float]:
        """Return the score s of every loss of the step."""
        ordered, last = sorted(losses), len(losses) - 1
        # If a losses are smaller and b are not larger, the equal ones have ranks a to b - 1, of mean (a + b - 1) / 2.
        return [(bisect_left(ordered, loss) + bisect_right(ordered, loss) - 1 - last) / (2 * last) for loss in losses]


def _z_scores(losses: Sequence[float], deviation: float) -> list[float]:
    mean = sum(losses) / len(losses)
    return [(loss - mean) / deviation if deviation != 0.0 else 0.0 for loss in losses]


def _of_pairs(scores: Sequence[float]) -> list[float]:
    return [(plus - minus) / 2.0 for plus, minus in zip(scores[::2], scores[1::2], strict=True)]
