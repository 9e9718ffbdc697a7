"""The noise of consecutive elements of a tensor, from counters that nobody stores.

Reference: `zo_hf.rng.draw.draw_slice`, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_hf.kernels.launch import launch, signed
from zo_hf.kernels.philox import elements

TILE = 1024  # elements of a program, a multiple of 128


def slice_noise(key: int, tensor: int, start: int, stop: int, table: Tensor | None, device: torch.device) -> Tensor:
    """Draw elements start to stop - 1 of a tensor's noise, float32 of shape (stop - start,).

    Args:
        key: key of the stream.
        tensor: key of the tensor.
        start, stop: the elements.
        table: the values of half words, float32 (65536,); None draws signs.
        device: device of the noise.
    """
    noise = torch.empty(stop - start, device=device)
    if len(noise):
        first = start - start % 128
        programs = (triton.cdiv(stop - first, TILE),)
        values = noise if table is None else table
        launch(
            _slice_noise,
            programs,
            noise,
            values,
            first,
            start,
            stop,
            signed(tensor),
            signed(key),
            TILE=TILE,
            IS_SIGN=table is None,
        )
    return noise


@triton.jit
def _slice_noise(
    noise,
    table,
    first: tl.int64,
    start: tl.int64,
    stop: tl.int64,
    tensor: tl.int64,
    key: tl.int64,
    TILE: tl.constexpr,
    IS_SIGN: tl.constexpr,
):
    begin = first + tl.program_id(0).to(tl.int64) * TILE
    z = elements(begin, tensor, key, table, TILE, IS_SIGN)
    place = begin + tl.arange(0, TILE)
    tl.store(noise + (place - start), z, (place >= start) & (place < stop))
