"""The random blocks of any counters, for every stream of a draw.

    block = Philox4x32-10(counter, key)

Reference: `zo_hf.rng.philox.philox4x32` and `pack`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo_hf.kernels.launch import launch, on_device, signed
from zo_hf.kernels.philox import words_of

BLOCKS = 256  # of a program


def random_blocks(counter: Sequence[Tensor], keys: Sequence[int]) -> Tensor:
    """Draw a block for every counter and key.

    Args:
        counter: the four words of every block's counter, int64 (n,) each, of any stride.
        keys: keys of the streams, 64 bits each.

    Returns:
        int64 of shape (keys * n, 2): words 0 and 1, then words 2 and 3, as `pack` lays them out.
    """
    count, device = len(counter[0]), counter[0].device
    drawn = torch.empty(len(keys) * count, 2, dtype=torch.int64, device=device)
    if count:
        streams = on_device(tuple(map(signed, keys)), torch.int64, device)
        strides = [word.stride(0) for word in counter]
        programs = (triton.cdiv(count, BLOCKS), len(keys))
        launch(_random_blocks, programs, drawn.view(torch.int32), *counter, *strides, streams, count, BLOCKS=BLOCKS)
    return drawn


@triton.jit
def _random_blocks(drawn, c0, c1, c2, c3, stride0, stride1, stride2, stride3, keys, count, BLOCKS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    blocks = first + tl.arange(0, BLOCKS)
    exist = blocks < count
    found = words_of(
        tl.load(c0 + blocks * stride0, exist, 0).to(tl.uint32),
        tl.load(c1 + blocks * stride1, exist, 0).to(tl.uint32),
        tl.load(c2 + blocks * stride2, exist, 0).to(tl.uint32),
        tl.load(c3 + blocks * stride3, exist, 0).to(tl.uint32),
        tl.load(keys + tl.program_id(1)),
    )
    place = 4 * first + tl.arange(0, 4 * BLOCKS)
    target = drawn + tl.program_id(1).to(tl.int64) * 4 * count
    tl.store(target + place, found.to(tl.int32, bitcast=True), place < 4 * count)
