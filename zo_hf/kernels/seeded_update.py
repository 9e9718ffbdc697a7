"""The update of MeZO (Malladi et al., arXiv 2305.17333, algorithm 1) in one pass over a weight, with z drawn on the way:

    W ← round(decay · W + Σⱼ sⱼ · zⱼ)        sⱼ = -η · cⱼ

The rounding is stochastic in half precision, where z is rounded to the weight's dtype first. Reference:
`zo_hf.subspaces.full.Full.apply_pending`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_hf.kernels.launch import launch, on_device, signed
from zo_hf.kernels.philox import elements, half_words, words
from zo_hf.kernels.rounding import stochastic_round

TILE = 4096  # elements of a program, a multiple of 128


def seeded_update(
    weight: Tensor,
    tensor: int,
    keys: Sequence[int],
    steps: Sequence[float],
    decay: float,
    rounding_key: int,
    table: Tensor | None,
) -> None:
    """Write a weight.

    Args:
        weight: all elements of the weight, (d,), contiguous; float32, bfloat16 or float16.
        tensor: key of the weight.
        keys: keys of the directions' streams.
        steps: sⱼ of every direction.
        decay: factor on the old weight.
        rounding_key: key of the stream that rounds.
        table: the values of half words in the weight's dtype, (65536,); None draws signs.
    """
    streams = on_device(tuple(map(signed, keys)), torch.int64, weight.device)
    scales = on_device(tuple(steps), torch.float32, weight.device)
    values = weight if table is None else table
    launch(
        _seeded_update,
        (triton.cdiv(len(weight), TILE),),
        weight,
        values,
        streams,
        scales,
        len(keys),
        decay,
        signed(tensor),
        signed(rounding_key),
        len(weight),
        TILE=TILE,
        IS_SIGN=table is None,
    )


@triton.jit
def _seeded_update(
    weight,
    table,
    keys,
    steps,
    directions,
    decay,
    tensor: tl.int64,
    rounding_key: tl.int64,
    count: tl.int64,
    TILE: tl.constexpr,
    IS_SIGN: tl.constexpr,
):
    dtype: tl.constexpr = weight.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * TILE
    place = first + tl.arange(0, TILE)
    exist = place < count
    value = tl.load(weight + place, exist, 0.0).to(tl.float32) * decay
    for j in range(directions):
        z = elements(first, tensor, tl.load(keys + j), table, TILE, IS_SIGN)
        value = tl.fma(z, tl.load(steps + j), value)
    uniform = tl.zeros((TILE,), tl.int32)
    if dtype != tl.float32:
        uniform = half_words(words(first // 8 + tl.arange(0, TILE // 8), tensor, rounding_key))
    tl.store(weight + place, stochastic_round(value, uniform, dtype), exist)
