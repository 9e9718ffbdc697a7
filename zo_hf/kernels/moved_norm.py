"""A normalization whose groups of rows have weights and biases of their own, in one launch:

    y = (x - mean(x)) / √(var(x) + ε) · w + b        layer norm
    y = x / √(mean(x²) + ε) · w                      RMS norm

Everything is computed in float32, whatever the dtype of x. Reference: `zo_hf.subspaces.per_group`, up to the rounding of the
sums over a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_hf.kernels.launch import launch


def moved_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centers: bool) -> Tensor:
    """Normalize every row.

    Args:
        x: the input, (groups · rows, d), contiguous; float32, bfloat16 or float16.
        weight: w of every group, float32 (groups, d), with the elements of a group next to each other.
        bias: b of every group, in the same form; None for none.
        eps: ε, added under the root.
        centers: True subtracts the mean, as a layer norm does.

    Returns:
        (groups · rows, d) in the dtype of x.
    """
    output = torch.empty_like(x)
    if not x.numel():
        return output
    groups, width = weight.shape
    biases = weight if bias is None else bias
    launch(
        _moved_norm,
        (len(x),),
        output,
        x,
        weight,
        biases,
        weight.stride(0),
        biases.stride(0),
        len(x) // groups,
        width,
        eps,
        WIDTH=triton.next_power_of_2(width),
        CENTERS=centers,
        HAS_BIAS=bias is not None,
    )
    return output


@triton.jit
def _moved_norm(
    output,
    x,
    weight,
    bias,
    weight_of_group: tl.int64,
    bias_of_group: tl.int64,
    rows,
    width,
    eps,
    WIDTH: tl.constexpr,
    CENTERS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    row = tl.program_id(0)
    group = row // rows
    column = tl.arange(0, WIDTH)
    exist = column < width
    place = row.to(tl.int64) * width + column
    value = tl.load(x + place, exist, 0.0).to(tl.float32)
    if CENTERS:
        value = tl.where(exist, value - tl.sum(value, 0) / width, 0.0)
    value = value / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    value *= tl.load(weight + group * weight_of_group + column, exist, 0.0)
    if HAS_BIAS:
        value += tl.load(bias + group * bias_of_group + column, exist, 0.0)
    tl.store(output + place, value.to(output.dtype.element_ty), exist)
