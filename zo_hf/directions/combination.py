"""Directions that are combinations of Gaussian draws, with coefficients that depend on all coordinates at once.

zᵢ = Σⱼ rᵢⱼ · gⱼ
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from zo_hf.directions.distribution import Distribution
from zo_hf.directions.distributions import GAUSSIAN
from zo_hf.rng.draw import NoiseLayout
from zo_hf.rng.stream import Stream


class Combination(Distribution):
    """Directions zᵢ = Σⱼ rᵢⱼ · gⱼ; a subclass computes the coefficients rᵢⱼ."""

    def coefficients(self, stream: Stream) -> list[tuple[Stream, float]]:
        """Return the streams of the draws gⱼ with their coefficients rᵢⱼ, at least one pair."""
        raise NotImplementedError

    def draw_layout(self, stream: Stream, layout: NoiseLayout, coordinates: Mapping[str, Tensor]) -> Tensor:
        return self._combine(stream, lambda one: GAUSSIAN.draw_layout(one, layout, coordinates))

    def draw_slice(self, stream: Stream, name: str, start: int, values: Tensor) -> Tensor:
        return self._combine(stream, lambda one: GAUSSIAN.draw_slice(one, name, start, values))

    def draw_rows(self, stream: Stream, name: str, rows: Tensor, values: Tensor) -> Tensor:
        return self._combine(stream, lambda one: GAUSSIAN.draw_rows(one, name, rows, values))

    def _combine(self, stream: Stream, draw: Callable[[Stream], Tensor]) -> Tensor:
        (first, factor), *others = self.coefficients(stream)
        z = draw(first).mul_(factor)
        for other, coefficient in others:
            # Two operations: a fused multiply-add may round differently in the middle and at the end of a tile.
            z.add_(draw(other).mul_(coefficient))
        return z
