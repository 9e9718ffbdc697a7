"""A checksum of a tensor's bits, in integers, computed where the tensor lies.

    sum = Σᵢ bitsᵢ · u[i mod n] · v[i div n]   mod 2⁶⁴        u, v: odd pseudo-random numbers, n = 65,536

Addition and multiplication mod 2⁶⁴ are exact and commute, so the result is the same on every device, in every order and
in chunks of any size. A change of one element always changes it, because its weight is odd; any other accident is missed
with a probability of about 2⁻⁶³. It is no defence against someone who looks for a collision.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK = 1 << 16
# Blocks summed at a time; their 64-bit copies are all the memory that a checksum takes. On a CPU they should stay in its
# cache (measured: 2 MiB are twice as fast as 8), elsewhere a call should be worth its start.
CPU_BLOCKS, DEVICE_BLOCKS = 4, 64

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def tensor_checksum(tensor: Tensor, blocks_at_a_time: int | None = None) -> int:
    """64 bits that depend on the bits and the number of the elements, not on their dtype's name or the shape.

    Args:
        tensor: of any dtype, on any device.
        blocks_at_a_time: how much of it to take at once, None for what suits the device; the result is the same.
    """
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.contiguous().view(-1)
    words = flat.view(_WORDS[flat.element_size()])
    blocks = blocks_at_a_time or (CPU_BLOCKS if words.device.type == "cpu" else DEVICE_BLOCKS)
    total = 0
    for start in range(0, len(words), BLOCK * blocks):
        total += _sum_of_blocks(words[start : start + BLOCK * blocks], start // BLOCK)
    return _mix(total + len(words) * _GOLDEN)


def _sum_of_blocks(words: Tensor, first: int) -> int:
    """words: (at most a chunk's,), of which block `first` is the first."""
    weights = _weights_in_block(words.device)
    total = 0
    whole = len(words) // BLOCK
    sums = (words[: whole * BLOCK].view(whole, BLOCK).long() * weights).sum(1).tolist()
    rest = words[whole * BLOCK :]
    if len(rest):
        sums.append((rest.long() * weights[: len(rest)]).sum().item())
    for block, value in enumerate(sums, start=first):
        total += value * (_mix(~block) | 1)
    return total & _MASK


@functools.lru_cache(maxsize=8)
def _weights_in_block(device: torch.device) -> Tensor:
    """u, (n,), int64."""
    weights = [_mix((i + 1) * _GOLDEN) | 1 for i in range(BLOCK)]
    return torch.tensor([w - (1 << 64) if w >> 63 else w for w in weights], device=device)


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele et al., 2014), a bijection of 64-bit words."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
