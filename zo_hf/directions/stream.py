"""Names for randomness: which key a draw uses, and which counters a tensor owns.

    key     = hash(seed, step, direction, purpose)                          64 bits
    counter = (block, block >> 32, low word, high word of hash(tensor name))

so that a random number depends on (seed, step, direction, tensor name, element index) and on nothing else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum


class Purpose(Enum):
    """What a draw is for; two purposes never share bits."""

    DIRECTION = "direction"
    BASIS = "basis"
    ROUNDING = "rounding"
    LAYERS = "layers"
    ORDER = "order"
    CURVATURE = "curvature"


@dataclass(frozen=True)
class Stream:
    """One independent sequence of random bits per tensor.

    Args:
        seed: the run's seed.
        step: the optimizer step (for a basis: the step at which it was drawn).
        direction: index of the direction within the step.
        purpose: what the bits are used for.
    """

    seed: int
    step: int = 0
    direction: int = 0
    purpose: Purpose = Purpose.DIRECTION

    @property
    def key(self) -> int:
        """64-bit Philox key."""
        return _hash64(f"{self.seed}/{self.step}/{self.direction}/{self.purpose.value}")


def tensor_key(name: str) -> int:
    """64 bits that stand for a tensor's name in the counter."""
    return _hash64(f"tensor/{name}")


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
