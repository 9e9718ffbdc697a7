"""Philox4x32-10 in few kernels, for devices on which a launch costs more than its arithmetic: the words of `philox`.

A round is four operations instead of ten. They read words in place, as halves of the products:

    P = C · M           C: c0, c2        M: the two multipliers        64-bit products, halves hi and lo
    C = hi(P) ^ lo(Q) ^ K                Q: the products of the round before, for lo(Q) are the words c1 and c3

C is zero-extended without a mask, because only the low halves of its elements are ever written. Keys of many streams
are one tensor, so that all directions of a step are drawn together.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from zo_hf.rng.philox import MULTIPLIERS, ROUNDS, WEYL

_WORD = 0xFFFFFFFF


def philox_blocks(counter: Tensor, others: Tensor, keys: Sequence[int]) -> Tensor:
    """Compute random blocks for every counter and key.

    Args:
        counter: words c0 and c2, int64 (2, n), each element in [0, 2**32).
        others: words c3 and c1, in this order, int64 (2, n); only their low 32 bits matter.
        keys: 64 bits each; the low word is k0.

    Returns:
        int64 of shape (keys, n, 2): words 0 and 1, then words 2 and 3, as `pack` lays them out.
    """
    rounds = _round_keys(keys, counter.device)
    multipliers = _multipliers(counter.device)
    shape = (2, len(keys), counter.shape[1])
    c = counter[:, None].expand(shape).clone()
    product, before = torch.empty_like(c), others[:, None]
    spare = torch.empty_like(c)
    c_low = _half(c, 0)
    for number in range(ROUNDS):
        torch.mul(c, multipliers, out=product)
        low, high = _half(before, 0), _half(product, 1)
        # Products stand in the order of c0 and c2, and c0 comes from that of c2.
        torch.bitwise_xor(high[1], low[1], out=c_low[0])
        torch.bitwise_xor(high[0], low[0], out=c_low[1])
        c_low.bitwise_xor_(rounds[number])
        product, before = (spare if number == 0 else before), product
    low = _half(before, 0)
    return torch.stack((c_low[0], low[1], c_low[1], low[0]), dim=-1).view(torch.int64)


def _half(words: Tensor, number: int) -> Tensor:
    """View the low (0) or the high (1) half of every element, int32 of the same shape."""
    return words.view(torch.int32).unflatten(-1, (-1, 2))[..., number]


@cache
def _multipliers(device: torch.device) -> Tensor:
    return torch.tensor(MULTIPLIERS, device=device)[:, None, None]


@cache
def _weyl(device: torch.device) -> Tensor:
    """Return what is added to the key's words up to each round, int64 (rounds, 2, 1)."""
    return torch.tensor([[number * word & _WORD for word in WEYL] for number in range(ROUNDS)], device=device)[
        ..., None
    ]


def _round_keys(keys: Sequence[int], device: torch.device) -> Tensor:
    """Return the words of every round's keys, int32 (rounds, 2, keys, 1)."""
    words = torch.zeros(2, len(keys), dtype=torch.int64, device=device)
    # As arguments of a kernel they need no copy from the host, for which it would wait.
    torch._foreach_add_(list(words.flatten().unbind()), [*(k & _WORD for k in keys), *(k >> 32 & _WORD for k in keys)])
    return _half(words + _weyl(device), 0)[..., None]


if sys.byteorder != "little":
    raise ImportError("zo_hf draws its random numbers on little-endian machines only")
