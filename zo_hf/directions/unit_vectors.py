"""Unit vectors instead of noise: the directions of coordinate-wise finite differences.

    turn t = step · B + i        zᵢ = e_k with k = order[t mod n]        n coordinates, B of them a step

The flat vector of coordinates is the tensors of a subspace one after another, in the order of the subspace. `order` is
the identity (cyclic) or one permutation drawn from the seed. A direction depends on (step, i) alone, so a resumed run
needs no stored position.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from zo_hf.directions.distribution import Distribution
from zo_hf.directions.options import ORDERS
from zo_hf.rng.draw import draw_half_words
from zo_hf.rng.stream import Purpose, Stream


@dataclass(frozen=True, eq=False)
class UnitVectors(Distribution):
    """Directions along single coordinates. Only `CoordinateBlocks` can move along them, for they are not drawn.

    Args:
        names: names of the coordinate tensors, in order.
        ends: end of each tensor in the flat vector.
        per_step: B, number of directions of a step.
        order: the coordinate at each turn of a cycle, int64 (n,).
    """

    name: ClassVar[str] = "coordinate"

    names: tuple[str, ...]
    ends: tuple[int, ...]
    per_step: int
    order: Tensor

    @property
    def dimension(self) -> int:
        """Number of coordinates, n."""
        return len(self.order)

    def place(self, stream: Stream) -> tuple[str, int]:
        """Return the coordinate of a direction: the name of its tensor, and its index in the flattened tensor."""
        index = int(self.order[(stream.step * self.per_step + stream.direction) % self.dimension])
        tensor = bisect_right(self.ends, index)
        return self.names[tensor], index - (self.ends[tensor - 1] if tensor else 0)

    def cycles(self, step: int) -> float:
        """Return the number of cycles through all coordinates before a step."""
        return step * self.per_step / self.dimension


def unit_vectors(coordinates: Mapping[str, Tensor], per_step: int, order: str, seed: int) -> UnitVectors:
    """Build the directions of coordinate-wise differences.

    Args:
        coordinates: the coordinate tensors, by name; only their sizes matter.
        per_step: B, number of directions of a step.
        order: "cyclic" or "permuted".
        seed: seed of the permutation.

    Raises:
        ValueError: a step would take a coordinate twice, or `order` is unknown.
    """
    ends = tuple(accumulate(tensor.numel() for tensor in coordinates.values()))
    if order not in ORDERS:
        raise ValueError(f"zo_coordinate_order={order!r} is unknown; choose one of {', '.join(ORDERS)}.")
    if per_step > ends[-1]:
        raise ValueError(
            f"zo_num_directions={per_step} exceeds the number of coordinates, {ends[-1]}; use at most {ends[-1]}."
        )
    turns = torch.arange(ends[-1]) if order == "cyclic" else _permutation(ends[-1], seed)
    return UnitVectors(tuple(coordinates), ends, per_step, turns)


def _permutation(length: int, seed: int) -> Tensor:
    """Draw a permutation, int64 (length,): the order of 64 random bits for each element."""
    words = draw_half_words(Stream(seed, purpose=Purpose.ORDER), "order", 0, 4 * length).long().view(length, 4)
    return (words << torch.tensor([0, 16, 32, 48])).sum(1).argsort(stable=True)
