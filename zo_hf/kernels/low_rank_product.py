"""The correction of a linear layer by low-rank factors, added to its output in one launch:

    y ← y + [x · V + e] · Fᵀ        F: the factors of the group that a row belongs to, with the bias as a column

The thin product x · V exists only in the kernel; e is 1 in the column of the bias. Reference:
`zo_hf.subspaces.low_rank.LowRank._correct_linear`, up to the rounding of its sums.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from zo_hf.kernels.launch import launch
from zo_hf.kernels.products import dtype_of_products

ROWS, IN, OUT = 16, 128, 128  # of a tile
# Programs that keep a GPU busy. Each of those that share rows makes their thin product anew.
_ENOUGH = 256


def add_low_rank_product(output: Tensor, x: Tensor, basis: Tensor, factors: Tensor, column_of_bias: int) -> None:
    """Add the correction of every group to its rows.

    Args:
        output: y, (groups · rows, m), contiguous; float32, bfloat16 or float16.
        x: inputs, (groups · rows, n), with columns next to each other; in the dtype of `output`.
        basis: V, (n, width), contiguous, in this dtype.
        factors: F, (groups, m, width), with the rows of a group next to each other, in this dtype.
        column_of_bias: the column to which e adds 1; -1 for none.
    """
    if not output.numel():
        return
    groups, features_out, width = factors.shape
    rows, features_in = len(output) // groups, x.shape[1]
    blocks = triton.cdiv(rows, ROWS)
    shares = min(triton.cdiv(features_out, OUT), triton.cdiv(_ENOUGH, blocks * groups))
    launch(
        _add_low_rank_product,
        (blocks, shares, groups),
        output,
        x,
        basis,
        factors,
        factors.stride(0),
        x.stride(0),
        rows,
        features_in,
        features_out,
        width,
        column_of_bias,
        ROWS=ROWS,
        IN=IN,
        OUT=OUT,
        WIDTH=max(16, triton.next_power_of_2(width)),
        PRODUCT=dtype_of_products(output.dtype),
    )


@triton.jit
def _add_low_rank_product(
    output,
    x,
    basis,
    factors,
    factors_of_group: tl.int64,
    row_of_x: tl.int64,
    rows,
    features_in,
    features_out,
    width,
    column_of_bias,
    ROWS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    dtype: tl.constexpr = output.dtype.element_ty
    group = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_row, is_column = (row < rows)[:, None], column < width
    of_all = (group * rows + row).to(tl.int64)[:, None]
    thin = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, features_in, IN):
        feature = start + tl.arange(0, IN)
        is_feature = feature < features_in
        inputs = tl.load(x + of_all * row_of_x + feature[None, :], is_row & is_feature[None, :], 0.0)
        right = tl.load(
            basis + feature[:, None] * width + column[None, :], is_feature[:, None] & is_column[None, :], 0.0
        )
        thin = tl.dot(inputs.to(PRODUCT), right.to(PRODUCT), thin, input_precision="ieee")
    thin += tl.where(column == column_of_bias, 1.0, 0.0)[None, :]
    left = thin.to(dtype).to(PRODUCT)
    factors += group * factors_of_group
    for start in range(tl.program_id(1) * OUT, features_out, tl.num_programs(1) * OUT):
        feature = start + tl.arange(0, OUT)
        is_feature = feature < features_out
        right = tl.load(
            factors + feature[None, :] * width + column[:, None], is_feature[None, :] & is_column[:, None], 0.0
        )
        target, exist = output + of_all * features_out + feature[None, :], is_row & is_feature[None, :]
        before = tl.load(target, exist, 0.0).to(tl.float32)
        tl.store(target, tl.dot(left, right.to(PRODUCT), before, input_precision="ieee").to(dtype), exist)
