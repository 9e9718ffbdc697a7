"""Uniform on a sphere (Flaxman, Kalai and McMahan, arXiv cs/0408007), of radius √d over all d coordinates together.

    z = √d · g / ‖g‖        g ~ N(0, I)

E[z zᵀ] = I, as for the Gaussian, but every direction has the same length: c does not vary with ‖z‖. In many dimensions
the two are nearly the same. The norm takes a pass of the generator more for every direction.
"""

from __future__ import annotations

import math

from zo_hf.directions.combination import Combination
from zo_hf.directions.distribution import Run
from zo_hf.directions.gram import UNIT, Gram
from zo_hf.directions.stream import Stream
from zo_hf.method import Method


class Sphere(Combination):
    """See the formula above."""

    name = "sphere"
    about = Method("Flaxman et al. (cs/0408007)")

    def __init__(self, run: Run) -> None:
        self._dimension = run.subspace.dimension
        self._gram = Gram(run.subspace.coordinates, 1)
        self._step: tuple[int, int] | None = None
        self._factors: dict[Stream, float] = {}

    def coefficients(self, stream: Stream) -> list[tuple[Stream, float]]:
        if self._step != (stream.seed, stream.step):
            self._step, self._factors = (stream.seed, stream.step), {}
        if stream not in self._factors:
            square = self._gram([stream])[0][0]
            self._factors[stream] = math.sqrt(self._dimension * UNIT / square)
        return [(stream, self._factors[stream])]
