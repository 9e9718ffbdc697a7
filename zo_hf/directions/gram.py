"""Exact inner products of Gaussian draws over all coordinates; they decide directions, so all ranks need equal bits.

    Gᵢⱼ = Σₑ kₑᵢ · kₑⱼ        kₑᵢ = round(2²⁴ · gₑᵢ), an integer

Sums of integers do not depend on threads, devices, order or tiles. k differs from 2²⁴ · g by at most one half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from zo_hf.directions.distributions import GAUSSIAN
from zo_hf.rng.draw import NoiseLayout, draw_slice
from zo_hf.rng.stream import Stream

#: Scale of a product of two k, relative to the product of the two g.
UNIT = 2**48

# Elements in memory at a time, of all draws together.
TILE = 1 << 20
_LOW = 2**24 - 1


class Gram:
    """Computes G for the draws over one set of coordinates.

    Args:
        coordinates: the coordinate tensors, by name; only their shapes and devices matter.
        draws: number of streams that are drawn together.
    """

    def __init__(self, coordinates: Mapping[str, Tensor], draws: int) -> None:
        self._tile = max(1 << 14, TILE // draws)
        self._large = {name: c for name, c in coordinates.items() if c.numel() > self._tile}
        self._layouts: list[NoiseLayout] = []
        small: dict[torch.device, dict[str, torch.Size]] = {}
        for name, coordinate in coordinates.items():
            if name in self._large:
                continue
            group = small.setdefault(coordinate.device, {})
            group[name] = coordinate.shape
            if sum(shape.numel() for shape in group.values()) > self._tile:
                self._layouts.append(NoiseLayout(small.pop(coordinate.device), coordinate.device))
        self._layouts += [NoiseLayout(group, device) for device, group in small.items()]

    def __call__(self, streams: Sequence[Stream]) -> list[list[int]]:
        """Compute the lower triangle of G for the streams' draws: row i has i + 1 integers, in units of 1 / UNIT."""
        products = [[0] * (i + 1) for i in range(len(streams))]
        for draws in self._pieces(streams):
            k = draws.mul_(2.0**24).round_().to(torch.int64)
            for i in range(len(streams)):
                # A product is below 2**54: its high and low parts are summed separately, so that no sum overflows.
                product = k[i] * k[: i + 1]
                high, low = (product >> 24).sum(1).tolist(), (product & _LOW).sum(1).tolist()
                for j in range(i + 1):
                    products[i][j] += (high[j] << 24) + low[j]
        return products

    def _pieces(self, streams: Sequence[Stream]) -> Iterator[Tensor]:
        """Yield the draws of all coordinates in pieces, float32 of shape (streams, elements), each element once."""
        for layout in self._layouts:
            flat = torch.stack([layout.draw(stream, GAUSSIAN) for stream in streams])
            # The flat vector also has noise in the gaps between tensors, which must not count.
            yield torch.cat([view.flatten(1) for view in layout.views(flat).values()], 1)
        for name, coordinate in self._large.items():
            for start in range(0, coordinate.numel(), self._tile):
                stop = min(start + self._tile, coordinate.numel())
                yield torch.stack(
                    [draw_slice(stream, name, start, stop, GAUSSIAN, coordinate.device) for stream in streams]
                )
