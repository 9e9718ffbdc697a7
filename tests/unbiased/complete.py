"""A complete set of directions, over which the mean of an estimate is its expectation and not a sample of it.

The q directions of a group are rows of a Hadamard matrix with the columns' signs drawn for the group. So 1/q · Σᵢ zᵢ·zᵢᵀ is
the identity for as many as q coordinates, and the mean of c·z is the gradient up to ε². A group that is evaluated along a
direction of another has other signs, and its mean is far from its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.linalg import hadamard
from torch import Tensor

from zo_hf.directions import DirectionContext, Distribution
from zo_hf.method_info import Method
from zo_hf.rng import NoiseLayout, Stream


class Complete(Distribution):
    """See above; `zo_num_directions` is a power of two, and at least the number of coordinates."""

    name = "complete"
    about = Method("Hadamard 1893")

    def __init__(self, context: DirectionContext) -> None:
        self._count, self._places, first = context.num_directions, {}, 0
        for name, coordinate in sorted(context.coordinates.items()):
            self._places[name] = slice(first, first + coordinate.numel())
            first += coordinate.numel()
        assert first <= self._count, f"{first} coordinates need as many directions, not {self._count}"
        self._rows = torch.tensor(hadamard(self._count), dtype=torch.float32)

    def _of(self, stream: Stream, name: str) -> Tensor:
        """z over one tensor, flat."""
        group, row = divmod(stream.direction, self._count)
        generator = torch.Generator().manual_seed(1000 * stream.step + group)
        signs = torch.randint(0, 2, (self._count,), generator=generator) * 2 - 1
        return (self._rows[row] * signs)[self._places[name]]

    def draw_layout(self, stream: Stream, layout: NoiseLayout, coordinates: Mapping[str, Tensor]) -> Tensor:
        z = torch.zeros(layout.size)
        for name, view in layout.views(z).items():
            view.copy_(self._of(stream, name).view(view.shape))
        return z

    def draw_slice(self, stream: Stream, name: str, start: int, values: Tensor) -> Tensor:
        return self._of(stream, name)[start : start + len(values)].clone()

    def draw_rows(self, stream: Stream, name: str, rows: Tensor, values: Tensor) -> Tensor:
        return self._of(stream, name).view(-1, values.shape[1])[rows]
