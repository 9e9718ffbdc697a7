"""Random bits inside a kernel: the words of `zo_hf.rng.philox`, by Triton's own Philox4x32-10 (Salmon et al., SC 2011).

    counter = (block, block >> 32, low word, high word of the tensor's key)          key = key of the stream

Reference: `zo_hf.rng.draw`, whose noise these functions draw bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words_of(c0, c1, c2, c3, key):
    """Draw the words of blocks from their counters, uint32 (n,) each: uint32 (4 n,), a block's four in order."""
    w0, w1, w2, w3 = tl.philox(key, c0, c1, c2, c3)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (w0.shape[0] * 4,))


@triton.jit
def words(blocks, tensor, key):
    """Draw the words of blocks of one tensor: int64 (n,) -> uint32 (4 n,). `tensor` is its key, int64, () or (n,)."""
    c0, c1 = blocks.to(tl.uint32), (blocks >> 32).to(tl.uint32)
    none = tl.zeros_like(c0)
    return words_of(c0, c1, none + tensor.to(tl.uint32), none + (tensor >> 32).to(tl.uint32), key)


@triton.jit
def half_words(words):
    """Split words into uniform integers in [0, 2**16): uint32 (n,) -> int32 (2 n,), the low half first."""
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (words.shape[0] * 2,)).to(tl.int32)


@triton.jit
def signs(words):
    """Turn every bit into a sign: uint32 (n,) -> float32 (32 n,). The lowest bit comes first, and a set bit gives -1."""
    bits = words[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :] & 1
    return tl.reshape(1.0 - 2.0 * bits.to(tl.float32), (words.shape[0] * 32,))


@triton.jit
def elements(first, tensor, key, table, COUNT: tl.constexpr, IS_SIGN: tl.constexpr):
    """Draw elements first to first + COUNT - 1 of a tensor's noise, float32 (COUNT,).

    first: int64, a multiple of 128. table: pointer to the 65,536 values of half words; signs need none.
    """
    if IS_SIGN:
        return signs(words(first // 128 + tl.arange(0, COUNT // 128), tensor, key))
    else:
        halves = half_words(words(first // 8 + tl.arange(0, COUNT // 8), tensor, key))
        return tl.load(table + halves).to(tl.float32)
