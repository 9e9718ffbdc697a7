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

Cost: 2q forward passes; q must be at least 2.
"""

from __future__ import annotations

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
        scores = self.scores(losses)
        return [(plus - minus) / 2.0 for plus, minus in zip(scores[::2], scores[1::2], strict=True)]

    def scores(self, losses: Sequence[float]) -> list[float]:
        """Return the score s of every loss of the step."""
        mean, deviation = sum(losses) / len(losses), standard_deviation(losses, len(losses))
        return [(loss - mean) / deviation if deviation != 0.0 else 0.0 for loss in losses]


class EvolutionRanks(Evolution):
    """Antithetic pairs, scored by centered ranks."""

    name = "evolution_ranks"
    aliases = ()
    about = Method("OpenAI-ES (1703.03864)", forwards="2q", needs="q at least 2")

    def scores(self, losses: Sequence[float]) -> list[float]:
        ordered, last = sorted(losses), len(losses) - 1
        # If a losses are smaller and b are not larger, the equal ones have ranks a to b - 1, of mean (a + b - 1) / 2.
        return [(bisect_left(ordered, loss) + bisect_right(ordered, loss) - 1 - last) / (2 * last) for loss in losses]
