"""A checksum of a tensor's bits, in integer arithmetic, computed on the device of the tensor.

    sum = Σᵢ bitsᵢ · u[i mod n] · v[i div n]   mod 2⁶⁴        u, v: odd pseudo-random numbers, n = 65,536

Addition and multiplication mod 2⁶⁴ are exact and commute. The result is therefore the same on every device, in every
order, and in chunks of any size. A change of one element always changes the checksum, because the element's weight is
odd. Any other accident is missed with a probability of about 2⁻⁶³. The checksum does not protect against deliberate
collisions.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

BLOCK = 1 << 16
# Blocks summed at a time; their 64-bit copies are all the memory that a checksum takes. On a CPU these should fit into
# its cache (measured: 2 MiB is twice as fast as 8 MiB). On other devices a call must be large enough for its launch.
CPU_BLOCKS, DEVICE_BLOCKS = 4, 64

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def tensor_checksum(tensor: Tensor, blocks_at_a_time: int | None = None) -> int:
    """Compute 64 bits that depend on the bits and the number of elements, but not on the dtype or the shape as such.

    Args:
        tensor: tensor of any shape and dtype, on any device.
        blocks_at_a_time: number of blocks to sum at a time, without effect on the result; None suits the device.

    Returns:
        An integer in [0, 2**64).
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


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over name, dtype, shape and checksum of every tensor, independent of order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        line = f"{name} {tensor.dtype} {list(tensor.shape)} {tensor_checksum(tensor):016x}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def saved_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over name, dtype, shape and CRC-32 of every tensor, independent of order and device.

    It is meant for what is written to a disk anyway: on a CPU a CRC takes a tenth of the time of `tensor_checksum`. A
    tensor that consists of others, such as a quantized weight of torchao, counts as these.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        for part, tensor in _plain_parts(name, tensors[name]):
            stored: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            digest.update(f"{part} {tensor.dtype} {list(tensor.shape)} {zlib.crc32(stored):08x}\n".encode())
    return digest.hexdigest()


def _plain_parts(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for part in sorted(tensor.__tensor_flatten__()[0]):
        yield from _plain_parts(f"{name}.{part}", getattr(tensor, part))


def _sum_of_blocks(words: Tensor, first: int) -> int:
    """Sum a chunk of words, (elements,), that starts with block `first`, mod 2⁶⁴."""
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
    """Return u, int64 (n,)."""
    weights = [_mix((i + 1) * _GOLDEN) | 1 for i in range(BLOCK)]
    return torch.tensor([w - (1 << 64) if w >> 63 else w for w in weights], device=device)


def _mix(x: int) -> int:
    """Apply the finalizer of SplitMix64 (Steele et al., 2014), a bijection of 64-bit words."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
