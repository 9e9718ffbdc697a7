"""Small weights alone (Sparse-MeZO; Liu et al., arXiv 2402.15751).

    z = m ⊙ g        mₑ = 1 where |θₑ| ≤ h,  g ~ N(0, I)

h is fixed before the first step, for each tensor on its own: the magnitude that a quarter of its entries do not exceed.
The mask is that of the weights as they are at each step, so that an entry which has grown beyond h stays where it is.
E[z zᵀ] = diag(m): the estimate is the gradient's part at the small weights. Nothing is held but h.

The paper tunes the sparsity for each task; three quarters is a choice made here. A tensor whose entries all have one
magnitude (the ones of a new norm, the zeros of a new bias) has no small ones, and moves whole. Weight decay is the
optimizer's, and knows of no mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zo_hf.directions.distribution import Run
from zo_hf.directions.masked import Masked
from zo_hf.directions.stream import Stream
from zo_hf.method import Method

SPARSITY = 0.75

_TILE = 1 << 20


class Sparse(Masked):
    """See the formula above.

    Args:
        run: what it draws for.
        sparsity: fraction of every tensor's entries that do not move.

    Raises:
        ValueError: the coordinates are not weights, or have no small entries.
    """

    name = "sparse"
    about = Method("Sparse-MeZO (2402.15751)", needs="zo_subspace full or adapter")
    reads_weights = True

    def __init__(self, run: Run, sparsity: float = SPARSITY) -> None:
        subspace = run.subspace
        if any(subspace.coordinates[site.name] is not site.parameter for site in subspace.sites):
            raise ValueError(
                f"zo_direction='sparse' moves small weights, and the coordinates of zo_subspace={subspace.name!r} are no "
                "weights; use zo_subspace='full'."
            )
        if all(_is_of_one_magnitude(c) for c in subspace.coordinates.values()):
            raise ValueError(
                "zo_direction='sparse' moves small weights, and in every tensor here all have one magnitude; use "
                "zo_direction='gaussian', or zo_subspace='full'."
            )
        self._coordinates, self._sparsity = subspace.coordinates, sparsity
        self._thresholds: dict[str, float] = {}

    def begin(self) -> None:
        if self._thresholds:
            return
        for name, weight in self._coordinates.items():
            if not _is_of_one_magnitude(weight):
                count = max(1, round((1 - self._sparsity) * weight.numel()))
                self._thresholds[name] = kth_magnitude(weight, count)

    def mask(self, name: str, values: Tensor, index: slice | Tensor) -> Tensor | None:
        assert self._thresholds, "begin comes first"
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
    """The k-th smallest |w|, k from 1, exactly and without a copy of the weight: counted, not sorted.

    The bits of a floating-point number without a sign order as the number does. They are found sixteen at a time, from
    the highest: those of the result so far choose the weights whose next sixteen are counted.
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
