"""Distributions with independent elements, Gaussian and Rademacher, exactly the same on every device.

Both look up the bits of Philox in a table, so that no logarithm or cosine differs between kinds of device:

- Rademacher: bit e of a tensor's stream decides the sign of element e.
- Gaussian: element e takes 16 bits k and is the k-th of 65,536 equally likely quantiles of N(0, 1), scaled to unit
  variance. The table is computed once, in float64. Its fourth moment is 2.9992 (3 for the continuous law) and its
  largest value is 4.33. E[z zᵀ] = I holds exactly, and this makes a two-point estimate unbiased.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from zo_hf import kernels
from zo_hf.directions.distribution import DirectionContext, Distribution
from zo_hf.method_info import Method
from zo_hf.rng import draw
from zo_hf.rng.stream import Stream, tensor_key


class Elementwise(Distribution):
    """A distribution that decodes every 128-bit block of Philox into elements of z. It needs no facts about a run."""

    #: Number of elements that one block gives.
    elements_per_block: ClassVar[int]

    def __init__(self, context: DirectionContext | None = None) -> None:
        pass

    @staticmethod
    def decode(packed: Tensor) -> Tensor:
        """Turn packed blocks, int64 of shape (n, 2), into float32 of shape (n * elements_per_block,)."""
        raise NotImplementedError

    def draw_layout(self, stream: Stream, layout: draw.NoiseLayout, coordinates: Mapping[str, Tensor]) -> Tensor:
        return layout.draw(stream, self)

    def draw_layouts(
        self, streams: Sequence[Stream], layout: draw.NoiseLayout, coordinates: Mapping[str, Tensor]
    ) -> Sequence[Tensor]:
        return layout.draw_all(streams, self).unbind()

    def draw_slice(self, stream: Stream, name: str, start: int, values: Tensor) -> Tensor:
        return draw.draw_slice(stream, name, start, start + len(values), self, values.device)

    def draw_rows(self, stream: Stream, name: str, rows: Tensor, values: Tensor) -> Tensor:
        return draw.draw_rows(stream, name, rows, values.shape[1], self)


class DrawnByKernels(Elementwise):
    """An elementwise distribution that the kernels of `zo_hf.kernels` draw as well, with the same bits."""

    @staticmethod
    def table(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Return the values of 16 random bits, (65536,), in a floating dtype; None if every bit is a sign."""
        raise NotImplementedError

    @property
    def has_kernels(self) -> bool:
        """True if kernels draw it; a class that derives from a named distribution may draw other numbers."""
        return DrawnByKernels in type(self).__bases__

    def draw_layout(self, stream: Stream, layout: draw.NoiseLayout, coordinates: Mapping[str, Tensor]) -> Tensor:
        return self.draw_layouts([stream], layout, coordinates)[0]

    def draw_layouts(
        self, streams: Sequence[Stream], layout: draw.NoiseLayout, coordinates: Mapping[str, Tensor]
    ) -> Sequence[Tensor]:
        if not (self.has_kernels and kernels.run_on(layout.device)):
            return super().draw_layouts(streams, layout, coordinates)
        from zo_hf.kernels.layout_noise import layout_noise

        keys = [stream.key for stream in streams]
        return layout_noise(*layout.units(), keys, self.table(layout.device)).unbind()

    def draw_slice(self, stream: Stream, name: str, start: int, values: Tensor) -> Tensor:
        if not (self.has_kernels and kernels.run_on(values.device)):
            return super().draw_slice(stream, name, start, values)
        from zo_hf.kernels.slice_noise import slice_noise

        stop, table = start + len(values), self.table(values.device)
        return slice_noise(stream.key, tensor_key(name), start, stop, table, values.device)


class Gaussian(DrawnByKernels):
    """Standard normal elements."""

    name = "gaussian"
    about = Method("MeZO (2305.17333)")
    elements_per_block = 8

    @staticmethod
    def decode(packed: Tensor) -> Tensor:
        return torch.index_select(_quantiles(packed.device), 0, draw.half_words(packed))

    @staticmethod
    def table(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        return _quantiles(device, dtype)


class Rademacher(DrawnByKernels):
    """Elements of +1 and -1 with equal probability."""

    name = "rademacher"
    about = Method("SPSA (Spall 1992); FZOO (2506.09034)")
    elements_per_block = 128

    @staticmethod
    def decode(packed: Tensor) -> Tensor:
        bits = packed.view(torch.int32).unsqueeze(-1) << _to_sign_bit(packed.device)
        return bits.bitwise_and_(_SIGN_BIT).bitwise_or_(_ONE).view(torch.float32).flatten()

    @staticmethod
    def table(device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        return None


@cache
def _quantiles(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the 65,536 values of a Gaussian element, (65536,), ascending; half precision is rounded from float32."""
    levels = 2**16
    half = torch.tensor(
        [NormalDist().inv_cdf((i + 0.5) / levels) for i in range(levels // 2, levels)], dtype=torch.float64
    )
    half /= half.square().mean().sqrt()
    return torch.cat((-half.flip(0), half)).float().to(device=device, dtype=dtype)


@cache
def _to_sign_bit(device: torch.device) -> Tensor:
    """Return the shifts that move each bit of a word to the sign bit, int32 (32,). The lowest bit comes first."""
    return torch.arange(31, -1, -1, dtype=torch.int32, device=device)


# The sign bit of a float32, and the number 1.0 without its sign, as integers of 32 bits.
_SIGN_BIT = -(2**31)
_ONE = 0x3F800000


GAUSSIAN = Gaussian()
RADEMACHER = Rademacher()
ELEMENTWISE: dict[str, Elementwise] = {kind.name: kind for kind in (GAUSSIAN, RADEMACHER)}

if sys.byteorder != "little":  # the views above read the low byte first
    raise ImportError("zo_hf draws its random numbers on little-endian machines only")
