"""Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

One round, with 32-bit words c0..c3 and key (k0, k1):

    (hi0, lo0) = M0 * c0        (hi1, lo1) = M1 * c2
    c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
    k0, k1 = k0 + W0, k1 + W1

The output is a pure function of (counter, key): any element can be drawn anywhere, in any order, on any device.

torch has no unsigned 32-bit arithmetic, so int64 tensors hold the words. A product of two 32-bit words wraps in int64 to
the right 64 bits. An arithmetic shift and a mask then give its high word.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute four random 32-bit words for each counter.

    Args:
        counter: four int64 tensors of shape (n,), each element in [0, 2**32). They are not modified.
        key: 64 bits; the low word is k0.

    Returns:
        Four int64 tensors of shape (n,), each element in [0, 2**32).
    """
    # The rounds overwrite their own scratch tensors, so that ten rounds allocate six tensors instead of a hundred.
    c0, c1, c2, c3 = (word.clone() for word in counter)
    product0, product1 = torch.empty_like(c0), torch.empty_like(c0)
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(ROUNDS):
        torch.mul(c0, MULTIPLIERS[0], out=product0)
        torch.mul(c2, MULTIPLIERS[1], out=product1)
        torch.bitwise_right_shift(product1, 32, out=c0)
        c0.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        torch.bitwise_right_shift(product0, 32, out=c2)
        c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        # The low words may keep their high bits for now: the next round multiplies only c0 and c2, which are masked.
        c1, product1 = product1, c1
        c3, product0 = product0, c3
        k0, k1 = (k0 + WEYL[0]) & _MASK, (k1 + WEYL[1]) & _MASK
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)
