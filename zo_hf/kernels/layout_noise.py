"""The noise of many tensors that lie end to end, for every stream of a draw, in one launch.

Reference: `zo_hf.rng.draw.NoiseLayout.draw_all`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_hf.kernels.launch import launch, on_device, signed
from zo_hf.kernels.philox import half_words, signs, words

UNITS = 16  # of a program; a unit is 128 elements of one tensor


def layout_noise(units: Tensor, low: Tensor, high: Tensor, keys: Sequence[int], table: Tensor | None) -> Tensor:
    """Draw the noise of every unit of 128 elements.

    Args:
        units: number of every unit within its tensor, int64 (units,).
        low, high: the two words of its tensor's key, int64 (units,).
        keys: keys of the streams.
        table: the values of half words, float32 (65536,); None draws signs.

    Returns:
        float32 of shape (keys, 128 * units).
    """
    noise = torch.empty(len(keys), 128 * len(units), device=units.device)
    streams = on_device(tuple(map(signed, keys)), torch.int64, units.device)
    programs = (triton.cdiv(len(units), UNITS), len(keys))
    values = noise if table is None else table
    launch(
        _layout_noise,
        programs,
        noise,
        values,
        units,
        low,
        high,
        streams,
        len(units),
        UNITS=UNITS,
        IS_SIGN=table is None,
    )
    return noise


@triton.jit
def _layout_noise(noise, table, units, low, high, keys, count, UNITS: tl.constexpr, IS_SIGN: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * UNITS
    mine = first + tl.arange(0, UNITS)
    exist = mine < count
    number = tl.load(units + mine, exist, 0)
    tensor = tl.load(low + mine, exist, 0) | (tl.load(high + mine, exist, 0) << 32)
    key = tl.load(keys + tl.program_id(1))
    if IS_SIGN:
        z = signs(words(number, tensor, key))
    else:  # sixteen blocks of a unit
        blocks = number[:, None] * 16 + tl.arange(0, 16)[None, :]
        tensors = tensor[:, None] + tl.zeros_like(blocks)
        halves = half_words(words(tl.reshape(blocks, (UNITS * 16,)), tl.reshape(tensors, (UNITS * 16,)), key))
        z = tl.load(table + halves)
    place = 128 * first + tl.arange(0, 128 * UNITS)
    target = noise + tl.program_id(1).to(tl.int64) * 128 * count
    tl.store(target + place, z, place < 128 * count)
