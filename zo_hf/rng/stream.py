"""Keys and counters: a draw's stream decides the key of the generator, and a tensor's name the counters.

    key     = hash(seed, step, direction, purpose)                          64 bits
    counter = (block, block >> 32, low word, high word of hash(tensor name))

A random number depends on (seed, step, direction, purpose, tensor name, element index) and on nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Purpose(Enum):
    """The use of a draw. Draws for different purposes take different keys, so they share no bits."""

    DIRECTION = "direction"
    BASIS = "basis"
    ROUNDING = "rounding"
    LAYERS = "layers"
    ORDER = "order"
    CURVATURE = "curvature"
    SAMPLING = "sampling"


@dataclass(frozen=True)
class Stream:
    """One independent sequence of random bits per tensor.

    Args:
        seed: seed of the run.
        step: optimizer step; for a basis, the step at which it was drawn.
        direction: index of the direction within the step.
        purpose: use of the bits.
    """

    seed: int
    step: int = 0
    direction: int = 0
    purpose: Purpose = Purpose.DIRECTION

    @property
    def key(self) -> int:
        """Key of the generator, 64 bits."""
        return _hash64(f"{self.seed}/{self.step}/{self.direction}/{self.purpose.value}")


#: Maps the index of a direction within the step to its stream.
StreamOf = Callable[[int], Stream]


def tensor_key(name: str) -> int:
    """Hash a tensor's name to the 64 bits that the counter holds of it."""
    return _hash64(f"tensor/{name}")


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
