"""Directions uniform on the sphere of radius √d over all d coordinates (Flaxman, Kalai and McMahan, arXiv cs/0408007).

    z = √d · g / ‖g‖        g ~ N(0, I)

E[z zᵀ] = I, as for the Gaussian, but all directions have the same length, so that c does not vary with ‖z‖. In many
dimensions the two are nearly the same. The norm costs one more pass of the generator for every direction.
"""

from __future__ import annotations

import math

from zo_hf.directions.combination import Combination
from zo_hf.directions.distribution import DirectionContext
from zo_hf.directions.gram import UNIT, Gram
from zo_hf.method_info import Method
from zo_hf.rng.stream import Stream


class Sphere(Combination):
    """Directions of length √d, as in the formula above."""

    name = "sphere"
    about = Method("Flaxman et al. (cs/0408007)")

    def __init__(self, context: DirectionContext) -> None:
        self._dimension = context.dimension
        self._gram = Gram(context.coordinates, 1)
        self._step: tuple[int, int] | None = None
        self._factors: dict[Stream, float] = {}

    def coefficients(self, stream: Stream) -> list[tuple[Stream, float]]:
        if self._step != (stream.seed, stream.step):
            self._step, self._factors = (stream.seed, stream.step), {}
        if stream not in self._factors:
            square = self._gram([stream])[0][0]
            self._factors[stream] = math.sqrt(self._dimension * UNIT / square)
        return [(stream, self._factors[stream])]
