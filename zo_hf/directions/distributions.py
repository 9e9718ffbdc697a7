"""Distributions over the bits of Philox: Gaussian and Rademacher, exact on every device.

Both are table look-ups, so no logarithm or cosine differs between kinds of device:

- Rademacher: bit e of a tensor's stream decides the sign of element e.
- Gaussian: element e takes 16 bits k and is the k-th of 65,536 equally likely quantiles of N(0, 1), scaled to unit
  variance. The table is computed once in float64. Its fourth moment is 2.9992 (3 for the continuous law) and its largest
  value 4.33; E[z zᵀ] = I, which is what makes a two-point estimate unbiased, holds exactly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from zo_hf.method import Method


@dataclass(frozen=True)
class Distribution:
    """How the 128 bits of a Philox block become elements of a direction.

    Args:
        name: the name used in options.
        elements_per_block: how many elements one block makes.
        decode: maps packed blocks, int64 of shape (n, 2), to float32 of shape (n * elements_per_block,).
        about: where it comes from and what it costs.
    """

    name: str
    elements_per_block: int
    decode: Callable[[Tensor], Tensor]
    about: Method


def pack(words: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Philox's four words side by side, int64 of shape (n, 2), so that a byte view reads them in order."""
    return torch.stack((words[0] | (words[1] << 32), words[2] | (words[3] << 32)), dim=-1)


def half_words(packed: Tensor) -> Tensor:
    """Uniform integers in [0, 2**16), int32 of shape (n * 8,), from packed blocks of shape (n, 2)."""
    return packed.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF).flatten()


def _decode_gaussian(packed: Tensor) -> Tensor:
    return torch.index_select(_quantiles(packed.device), 0, half_words(packed))


def _decode_rademacher(packed: Tensor) -> Tensor:
    return torch.index_select(_signs(packed.device), 0, packed.view(torch.uint8).to(torch.int32).flatten()).flatten()


@cache
def _quantiles(device: torch.device) -> Tensor:
    """The 65,536 values of the Gaussian, float32, ascending."""
    levels = 2**16
    half = torch.tensor(
        [NormalDist().inv_cdf((i + 0.5) / levels) for i in range(levels // 2, levels)], dtype=torch.float64
    )
    half /= half.square().mean().sqrt()
    return torch.cat((-half.flip(0), half)).to(device=device, dtype=torch.float32)


@cache
def _signs(device: torch.device) -> Tensor:
    """Eight signs for every byte, float32 (256, 8); the lowest bit comes first, a set bit is -1."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (1 - 2 * bits).to(device=device, dtype=torch.float32)


GAUSSIAN = Distribution("gaussian", 8, _decode_gaussian, Method("MeZO (2305.17333)"))
RADEMACHER = Distribution("rademacher", 128, _decode_rademacher, Method("SPSA (Spall 1992); FZOO (2506.09034)"))
DISTRIBUTIONS = {distribution.name: distribution for distribution in (GAUSSIAN, RADEMACHER)}

if sys.byteorder != "little":  # the views above read the low byte first
    raise ImportError("zo_hf draws its random numbers on little-endian machines only")
