"""Evolution strategies: antithetic pairs, of whose losses only their order or their distances in the population count.

    sᵢ± = score of L(ξ ± ε·zᵢ) among the 2q losses of the step        cᵢ = (sᵢ₊ - sᵢ₋) / 2        ĝ = 1/q · Σᵢ cᵢ · zᵢ

    evolution        s = (l - l̄) / σ        z-scores, σ² = 1/2q · Σ (l - l̄)²  (Qiu et al., arXiv 2509.24372)
    evolution_ranks  s = rank(l)/(2q-1) - ½  centred ranks, equal losses share the mean of theirs (Salimans et al., arXiv
                                             1703.03864; Wierstra et al., "Natural evolution strategies", 2014)

ĝ is the mean over the 2q members of s times the member's own ±z; as in 2509.24372 the factor 1/ε of 1703.03864 is left to
the learning rate, which so is about the length of a step per coordinate (times √q). Scores do not change when the loss is
scaled or shifted (z-scores) or replaced by any increasing function of it (ranks), so the loss may be any number that is to
be small, e.g. minus a reward. Where all losses are equal c is 0. In the low_rank subspace the members share one forward
pass, as in EGGROLL (arXiv 2511.16652).

Cost: 2q forward passes, q at least 2.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from zo_hf.estimators.fzoo import standard_deviation
from zo_hf.estimators.two_point import TwoPoint
from zo_hf.method import Method


class Evolution(TwoPoint):
    """Antithetic pairs and z-scores."""

    name = "evolution"
    about = Method("ES at scale (2509.24372), EGGROLL (2511.16652)", forwards="2q", needs="q of at least 2")
    least_directions = 2
    is_scale_free = True

    def projected_gradients(self, losses: Sequence[float]) -> list[float]:
        scores = self.scores(losses)
        return [(plus - minus) / 2.0 for plus, minus in zip(scores[::2], scores[1::2], strict=True)]

    def scores(self, losses: Sequence[float]) -> list[float]:
        """s of every loss of the step."""
        mean, deviation = sum(losses) / len(losses), standard_deviation(losses, len(losses))
        return [(loss - mean) / deviation if deviation != 0.0 else 0.0 for loss in losses]


class EvolutionRanks(Evolution):
    """Antithetic pairs and centred ranks."""

    name = "evolution_ranks"
    about = Method("OpenAI-ES (1703.03864)", forwards="2q", needs="q of at least 2")

    def scores(self, losses: Sequence[float]) -> list[float]:
        ordered, last = sorted(losses), len(losses) - 1
        # With a losses below and b not above, the ranks of its equals are a to b - 1, and their mean (a + b - 1) / 2.
        return [(bisect_left(ordered, loss) + bisect_right(ordered, loss) - 1 - last) / (2 * last) for loss in losses]
