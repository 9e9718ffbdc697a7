"""The Gaussian mechanism on the projected gradients of rows (DP-ZO, Tang et al., arXiv 2401.04343; DPZero, Zhang et al.,
arXiv 2310.09639).

    c̃ᵢ = cᵢ · min(1, C / ‖cᵢ‖)                 cᵢ: the q numbers of row i, along the directions of its group
    c_g = (Σ_{i in g} c̃ᵢ + σ·C·N(0, I)) / B      one sum for every group g, with noise of its own; B: expected rows of a step

A row is in one group alone. So adding or removing it changes the vector of all sums by at most C in Euclidean length, however
many groups and directions a step has. The sums with noise are a Gaussian mechanism of noise multiplier σ (Dwork and Roth,
"The Algorithmic Foundations of Differential Privacy", Theorem A.1). Everything that follows from them, weights and log
included, is as private (post-processing, Proposition 2.1). Clipping the q numbers of a row together is DP-AggZO's rule.

Floating point would spoil this: which sums are possible tells about their terms (Mironov, CCS 2012). So clipped numbers are
truncated to whole multiples of C · 2⁻⁴⁰. Their sum is exact in integers, in any order, and the noise is rounded before it is
added. For an integer s, s + round(N) = round(s + N): what leaves is the Gaussian mechanism, rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from zo_hf.privacy.secret import Secret

#: Steps of the grid within the bound C.
GRID = 1 << 40


class GaussianMechanism:
    """Bounds the numbers of rows, and adds noise to their sums.

    Args:
        noise_multiplier: σ, standard deviation of the noise in units of `max_c`; 0 adds none.
        max_c: C, the largest length of a row's numbers.
    """

    def __init__(self, noise_multiplier: float, max_c: float) -> None:
        self.noise_multiplier, self.max_c = noise_multiplier, max_c

    def bounded(self, numbers: Sequence[float]) -> list[int]:
        """Return a row's numbers in steps of the grid, of length at most `GRID`; a row that is not finite counts as 0."""
        largest = max(map(abs, numbers), default=0.0)
        if not all(map(math.isfinite, numbers)) or largest == 0.0:
            return [0] * len(numbers)
        # Divided by the largest first, so that no square overflows.
        parts = [c / largest for c in numbers]
        length = math.sqrt(sum(part * part for part in parts))
        factor = min(largest * length / self.max_c, 1.0) / length
        found = [math.trunc(part * factor * GRID) for part in parts]
        # Rounding of the factor may leave a length just above the bound.
        while sum(c * c for c in found) > GRID * GRID:
            found = [c - (c > 0) + (c < 0) for c in found]
        return found

    def noise(self, secret: Secret, step: int, count: int) -> list[int]:
        """Return the noise of a step's sums, in steps of the grid."""
        if not self.noise_multiplier:
            return [0] * count
        scale = self.noise_multiplier * GRID
        return [round(scale * number) for number in secret.gaussian(step, count)]

    def mean(self, sums: Sequence[int], rows: int) -> list[float]:
        """Return sums in steps of the grid as numbers of loss per unit along z, divided by `rows`."""
        return [total / GRID * self.max_c / rows for total in sums]
