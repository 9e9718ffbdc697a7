"""A fold of low-rank factors in one pass over the weight:

    W ← round(decay · W + Σₖ left[:, k] · right[:, k]ᵀ)

The rounding is stochastic in half precision. Reference: `zo_hf.subspaces.fold_pieces`, bit for bit where its matrix product
adds the r terms in order with one rounding each, as this kernel does, and else up to the rounding of that sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_hf.kernels.launch import launch, on_device, signed
from zo_hf.kernels.philox import half_words, words
from zo_hf.kernels.rounding import stochastic_round

TILE = 1024  # elements of a program, a multiple of 8


def fold(rows: Tensor, left: Tensor, right: Tensor | None, decay: float, key: int, tensor: int, first: int) -> None:
    """Write the rows of a weight.

    Args:
        rows: the rows, (k, n), contiguous; or elements of a vector, (k,); float32, bfloat16 or float16.
        left: (k, r), or what a vector's elements move by, (k,); float32.
        right: (n, r); None for a vector.
        decay: factor on the old rows.
        key: key of the stream that rounds.
        tensor: key of the weight.
        first: index of the first element in the weight.
    """
    if not rows.numel():
        return
    if right is None:  # a matrix of one column, to which a factor of 1 belongs
        left, right = left[:, None], on_device((1.0,), torch.float32, rows.device)[:, None]
    begin = first - first % 8
    programs = (triton.cdiv(first + rows.numel() - begin, TILE),)
    strides = (*left.stride(), *right.stride())
    launch(
        _fold,
        programs,
        rows,
        left,
        right,
        *strides,
        decay,
        signed(key),
        signed(tensor),
        begin,
        first,
        rows.numel(),
        len(right),
        RANK=left.shape[1],
        TILE=TILE,
    )


@triton.jit
def _fold(
    rows,
    left,
    right,
    left_row,
    left_column,
    right_row,
    right_column,
    decay,
    key: tl.int64,
    tensor: tl.int64,
    begin: tl.int64,
    first: tl.int64,
    count: tl.int64,
    width: tl.int64,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
):
    dtype: tl.constexpr = rows.dtype.element_ty
    start = begin + tl.program_id(0).to(tl.int64) * TILE
    place = start + tl.arange(0, TILE) - first
    exist = (place >= 0) & (place < count)
    row, column = place // width, place % width
    update = tl.load(left + row * left_row, exist, 0.0) * tl.load(right + column * right_row, exist, 0.0)
    for k in range(1, RANK):
        here = tl.load(left + row * left_row + k * left_column, exist, 0.0)
        there = tl.load(right + column * right_row + k * right_column, exist, 0.0)
        update = tl.fma(here, there, update)
    value = tl.load(rows + place, exist, 0.0).to(tl.float32) * decay + update
    uniform = tl.zeros((TILE,), tl.int32)
    if dtype != tl.float32:
        uniform = half_words(words(start // 8 + tl.arange(0, TILE // 8), tensor, key))
    tl.store(rows + place, stochastic_round(value, uniform, dtype), exist)
