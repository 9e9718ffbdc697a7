"""Directions on small weights only (Sparse-MeZO; Liu et al., arXiv 2402.15751).

    z = m ⊙ g        mₑ = 1 where |θₑ| ≤ h,  g ~ N(0, I)

Before the first step, each tensor gets its own threshold h: the magnitude that a quarter of its entries do not exceed.
The mask follows the present weights at every step, so an entry that has grown beyond h stops moving.
E[z zᵀ] = diag(m): on average an estimate is the gradient at the small weights. Only h is stored.

The paper tunes the sparsity for each task; three quarters is our choice. A tensor in which all entries have one
magnitude, as in a new norm or bias, has no small entries and moves whole. Weight decay is the optimizer's and ignores
the mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zo_hf.directions.distribution import DirectionContext
from zo_hf.directions.masked import Masked
from zo_hf.method_info import Method
from zo_hf.rng.stream import Stream

SPARSITY = 0.75

_TILE = 1 << 20


class Sparse(Masked):
    """Gaussian directions on the small weights, as in the formula above.

    Args:
        context: facts about the run.
        sparsity: fraction of the entries of each tensor that do not move.

    Raises:
        ValueError: the coordinates are not weights, or in every tensor all entries have one magnitude.
    """

    name = "sparse"
    about = Method("Sparse-MeZO (2402.15751)", needs="zo_subspace='full' or 'adapter'")
    reads_weights = True

    def __init__(self, context: DirectionContext, sparsity: float = SPARSITY) -> None:
        if not context.are_weights:
            raise ValueError(
                "zo_direction='sparse' moves small weights, but the coordinates of this zo_subspace are not weights; "
                "use zo_subspace='full'."
            )
        if all(_is_of_one_magnitude(c) for c in context.coordinates.values()):
            raise ValueError(
                "zo_direction='sparse' moves small weights, but all weights of each tensor have the same magnitude; "
                "use zo_direction='gaussian', or zo_subspace='full'."
            )
        self._coordinates, self._sparsity = context.coordinates, sparsity
        self._thresholds: dict[str, float] = {}

    def begin(self) -> None:
        if self._thresholds:
            return
        for name, weight in self._coordinates.items():
            if not _is_of_one_magnitude(weight):
                count = max(1, round((1 - self._sparsity) * weight.numel()))
                self._thresholds[name] = kth_magnitude(weight, count)

    def mask(self, name: str, values: Tensor, index: slice | Tensor) -> Tensor | None:
        assert self._thresholds, "call begin() before the first draw"
        return values.abs() <= self._thresholds[name] if name in self._thresholds else None

    def moving(self, stream: Stream, dimension: int) -> float:
        chosen = sum(self._coordinates[name].numel() for name in self._thresholds)
        return dimension - self._sparsity * chosen

    def state(self) -> dict[str, float]:
        return dict(self._thresholds)

    def load_state(self, state: Mapping[str, float]) -> None:
        self._thresholds = dict(state)


@torch.no_grad()
def kth_magnitude(weight: Tensor, k: int) -> float:
    """Return the k-th smallest |w| exactly, k from 1, by counting: sorting would take a copy of the weight.

    Floating-point numbers without a sign have the same order as their bits. The function finds the bits of the result
    sixteen at a time, highest first. In each round it counts the next sixteen bits of the weights that agree so far.

    Args:
        weight: floating-point tensor of any shape.
        k: 1 for the smallest magnitude, weight.numel() for the largest.
    """
    wide = weight.dtype == torch.float64
    width, integer = (64, torch.int64) if wide else (32, torch.int32)
    found = 0
    for shift in range(width - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=weight.device)
        for tile in weight.detach().reshape(-1).split(_TILE):
            bits = (tile if wide else tile.float()).abs().view(integer)
            if shift < width - 16:
                bits = bits[bits >> (shift + 16) == found]
            counts += torch.bincount(bits >> shift & 0xFFFF, minlength=1 << 16)
        reached = counts.cumsum(0)
        digit = int((reached < k).sum())
        k -= int(reached[digit] - counts[digit])
        found = found << 16 | digit
    return float(torch.tensor(found, dtype=integer).view(torch.float64 if wide else torch.float32))


def _is_of_one_magnitude(weight: Tensor) -> bool:
    low, high = weight.detach().aminmax()
    return bool((weight.detach().abs() == max(abs(low), abs(high))).all())
