"""The random numbers of private training, which no reader of the log may know.

Directions come from the seed that a trajectory publishes. Noise from that seed could be drawn again and subtracted, and a
batch that is known gets no privacy from sampling. Both therefore come from 256 bits of the operating system,

    bits of (purpose, step) = SHAKE-256(secret ‖ purpose ‖ step)        (FIPS 202; a pseudorandom function of its prefix)

which checkpoints alone hold. So a resumed run draws the same numbers, and the log holds sums that have their noise already.
"""

from __future__ import annotations

import hashlib
import math
import os

import numpy as np

#: Bytes of a secret.
LENGTH = 32


class Secret:
    """A key, and the random numbers that follow from it.

    Args:
        key: `LENGTH` bytes; None draws new ones from the operating system.

    Raises:
        ValueError: the key has another length.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self.key = os.urandom(LENGTH) if key is None else key
        if len(self.key) != LENGTH:
            raise ValueError(f"the secret has {len(self.key)} bytes and needs {LENGTH}; use the file of a checkpoint.")

    def __repr__(self) -> str:
        return "Secret(...)"  # never in a log or a traceback

    def words(self, purpose: str, step: int, count: int) -> np.ndarray:
        """Return uniform integers below 2**64, uint64 (count,)."""
        name = purpose.encode()
        message = self.key + len(name).to_bytes(1, "little") + name + step.to_bytes(8, "little")
        return np.frombuffer(hashlib.shake_256(message).digest(8 * count), "<u8")

    def gaussian(self, step: int, count: int) -> list[float]:
        """Return numbers of the standard normal distribution (Box and Muller 1958), in float64."""
        words = self.words("noise", step, 2 * count).tolist()
        pairs = zip(words[::2], words[1::2], strict=True)
        # 53 bits each; the first is in (0, 1], the second in [0, 1).
        uniforms = [(((a >> 11) + 1) * 2.0**-53, (b >> 11) * 2.0**-53) for a, b in pairs]
        return [math.sqrt(-2.0 * math.log(u)) * math.cos(2.0 * math.pi * v) for u, v in uniforms]

    def groups(self, step: int, count: int, groups: int) -> list[int]:
        """Return a uniform group for each of `count` rows; below 2**32 groups, the bias is below 2**-32."""
        return (self.words("groups", step, count) % np.uint64(groups)).tolist()
