"""Orthogonal directions in a step (Choromanski et al., "Structured evolution and compact architectures", 1804.02395).

    Z = √d · L⁻¹ · g        g: (q, d), Gaussian;  L · Lᵀ = g · gᵀ, L lower triangular with a positive diagonal

This is the Gram-Schmidt process on the rows of g. Each zᵢ is uniform on the sphere of radius √d, and together they are
Haar distributed: E[z zᵀ] = I. With q = d an estimate is the whole gradient.

L is computed from exact products of the draws, so every process finds the same one. Each zᵢ is a combination of the
first i draws, so no direction is stored. This costs q passes of the generator per step, and about q/2 draws for each
direction.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from zo_hf.directions.combination import Combination
from zo_hf.directions.distribution import DirectionContext
from zo_hf.directions.gram import UNIT, Gram
from zo_hf.method_info import Method
from zo_hf.rng.stream import Stream


class Orthogonal(Combination):
    """Orthogonal directions, as in the formula above.

    Raises:
        ValueError: a step has more directions than there are coordinates.
    """

    name = "orthogonal"
    about = Method("Choromanski et al. (1804.02395)", needs="q at most d")

    def __init__(self, context: DirectionContext) -> None:
        self._dimension, self._count = context.dimension, context.num_directions
        if self._count > self._dimension:
            raise ValueError(
                f"zo_direction='orthogonal' cannot give zo_num_directions={self._count} directions over "
                f"{self._dimension} coordinates; use at most {self._dimension}, or zo_direction='sphere'."
            )
        self._gram = Gram(context.coordinates, self._count)
        self._step: tuple[int, int] | None = None
        self._rows: list[list[float]] = []

    def coefficients(self, stream: Stream) -> list[tuple[Stream, float]]:
        draws = [replace(stream, direction=j) for j in range(self._count)]
        if self._step != (stream.seed, stream.step):
            products = self._gram(draws)
            square = torch.zeros(self._count, self._count, dtype=torch.float64)
            for i, row in enumerate(products):
                square[i, : i + 1] = torch.tensor([product / UNIT for product in row], dtype=torch.float64)
            self._rows = (inverse_factor(square) * self._dimension**0.5).tolist()
            self._step = stream.seed, stream.step
        return list(zip(draws, self._rows[stream.direction][: stream.direction + 1], strict=False))


def inverse_factor(square: Tensor) -> Tensor:
    """Return L⁻¹, (q, q) float64, for L · Lᵀ = `square`, (q, q) float64; only the lower triangle of it is read.

    The code works on single elements, because the sums of a library depend on the processor and the number of threads.
    """
    rest, size = square.clone(), len(square)
    inverse = torch.eye(size, dtype=square.dtype)
    for k in range(size):
        rest[k:, k] /= rest[k, k].sqrt()
        column = rest[k + 1 :, k]
        rest[k + 1 :, k + 1 :] -= column[:, None] * column
        inverse[k] /= rest[k, k]
        inverse[k + 1 :] -= column[:, None] * inverse[k]
    return inverse
