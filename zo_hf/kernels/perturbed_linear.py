"""A linear layer at several probes, with signs z that exist only in the kernel (the probe of MeZO, arXiv 2305.17333):

    y = x · Wᵀ + s · x · zᵀ + b + s · z_b        s: the signed distance of the probe that a row belongs to

Both products share the reads of x and W, and the rows of a tile, of either sign, share the draw of z. W ± ε · z is never
formed, because rounding to half precision would change z. Reference: `zo_hf.subspaces.full.Full._linear`, up to the rounding of its sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_hf.kernels.launch import launch, on_device, signed
from zo_hf.kernels.philox import signs, words
from zo_hf.kernels.products import dtype_of_products


def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tensors: tuple[int, int | None],
    keys: Sequence[int],
    scales: Sequence[float],
) -> Tensor:
    """Compute the output of the layer at every probe.

    Args:
        x: inputs, (probes, rows, n), contiguous; float32, bfloat16 or float16, in which the products are computed.
        weight: W, (m, n), contiguous, with n a multiple of 32.
        bias: b, (m,), or None.
        tensors: key of the weight, and of the bias if it moves.
        keys: key of every probe's stream.
        scales: s of every probe.

    Returns:
        (probes, rows, m) in the dtype of x.
    """
    probes, rows, features_in = x.shape
    features_out, shared = len(weight), _sharing(keys)
    output = x.new_empty(probes, rows, features_out)
    if not output.numel():
        return output
    streams = on_device(tuple(map(signed, keys[::shared])), torch.int64, x.device)
    distances = on_device(tuple(scales), torch.float32, x.device)
    # A tile of float32 takes twice the shared memory.
    size = 32 if x.dtype == torch.float32 else 64
    programs = (triton.cdiv(shared * rows, size), triton.cdiv(features_out, size), probes // shared)
    key_of_weight, key_of_bias = tensors
    launch(
        _perturbed_linear,
        programs,
        output,
        x,
        weight,
        weight if bias is None else bias,
        streams,
        distances,
        signed(key_of_weight),
        signed(key_of_bias or 0),
        shared,
        rows,
        features_in,
        features_out,
        SIZE=size,
        HAS_BIAS=bias is not None,
        MOVES_BIAS=key_of_bias is not None,
        PRODUCT=dtype_of_products(x.dtype),
        num_stages=2,
    )
    return output


def _sharing(keys: Sequence[int]) -> int:
    """Return the number of consecutive probes that share each direction; 1 unless it is the same for all."""
    shared = next((i for i, key in enumerate(keys) if key != keys[0]), len(keys))
    runs = [set(keys[i : i + shared]) for i in range(0, len(keys), shared)]
    return shared if len(keys) % shared == 0 and all(len(run) == 1 for run in runs) else 1


@triton.jit
def _words_with(index, tensor, key):
    """Draw the words that hold the signs of elements, int64 (n,) -> uint32 (n,), at the price of a block each."""
    found = tl.reshape(words(index // 128, tensor, key), (index.shape[0], 4))
    is_mine = (index // 32 % 4)[:, None] == tl.arange(0, 4)[None, :]
    return tl.sum(tl.where(is_mine, found, 0), 1).to(tl.uint32)


@triton.jit
def _signs_of_rows(features, start, width, tensor, key, SIZE: tl.constexpr):
    """Draw z[features, start to start + 127], float32 (SIZE, 128), for rows that begin with a word."""
    index = features.to(tl.int64)[:, None] * width + start + 32 * tl.arange(0, 4)[None, :]
    return tl.reshape(signs(_words_with(tl.reshape(index, (SIZE * 4,)), tensor, key)), (SIZE, 128))


@triton.jit
def _perturbed_linear(
    output,
    x,
    weight,
    bias,
    keys,
    scales,
    tensor: tl.int64,
    tensor_of_bias: tl.int64,
    shared,
    rows,
    features_in,
    features_out,
    SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MOVES_BIAS: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    run = tl.program_id(2)
    key = tl.load(keys + run)
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    feature = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    is_row, is_feature = row < shared * rows, feature < features_out
    of_run = (run * shared * rows + row).to(tl.int64)
    scale = tl.load(scales + of_run // rows, is_row, 0.0)
    plain = tl.zeros((SIZE, SIZE), tl.float32)
    moved = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, features_in, 128):
        column = start + tl.arange(0, 128)
        is_column = column < features_in
        inputs = tl.load(
            x + of_run[:, None] * features_in + column[None, :], is_row[:, None] & is_column[None, :], 0.0
        )
        base = tl.load(
            weight + feature.to(tl.int64)[:, None] * features_in + column[None, :],
            is_feature[:, None] & is_column[None, :],
            0.0,
        )
        z = _signs_of_rows(feature, start, features_in, tensor, key, SIZE)
        inputs = inputs.to(PRODUCT)
        plain = tl.dot(inputs, tl.trans(base.to(dtype).to(PRODUCT)), plain, input_precision="ieee")
        moved = tl.dot(inputs, tl.trans(z.to(PRODUCT)), moved, input_precision="ieee")
    result = plain + scale[:, None] * moved
    if HAS_BIAS:
        offset = tl.load(bias + feature, is_feature, 0.0).to(tl.float32)
        result += offset[None, :]
        if MOVES_BIAS:
            word = _words_with(feature.to(tl.int64), tensor_of_bias, key)
            z = 1.0 - 2.0 * (word >> (feature % 32).to(tl.uint32) & 1).to(tl.float32)
            result += scale[:, None] * z[None, :]
    target = output + of_run[:, None] * features_out + feature[None, :]
    tl.store(target, result.to(dtype), is_row[:, None] & is_feature[None, :])
