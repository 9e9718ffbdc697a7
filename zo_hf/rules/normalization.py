"""The scalar-normalized step (MEAZO, arXiv 2605.03869): c is divided by its running root mean square.

    v ← β·v + (1 - β)·c²        c ← c / √(v / (1 - βᵗ))

Like zeroth-order Adam, it does not depend on the scale of the loss, and it stores a single number. The learning rate
is then the root mean square length of a step per coordinate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from zo_hf.method_info import Method

BETA = 0.99


@dataclass
class ScalarNormalization:
    """A running mean of c² over steps, and the number of steps in it."""

    about: ClassVar[Method] = Method("MEAZO (2605.03869)", memory="1")

    mean_square: float = 0.0
    steps: int = 0

    def __call__(self, projected_gradients: Sequence[float]) -> list[float]:
        """Divide the finite projected gradients of one step by the running root mean square, which includes them."""
        square = sum(c * c for c in projected_gradients) / len(projected_gradients)
        self.mean_square = BETA * self.mean_square + (1 - BETA) * square
        self.steps += 1
        root = self.root
        return [c / root if root > 0 else 0.0 for c in projected_gradients]

    @property
    def root(self) -> float:
        """The running root mean square of c; 0 before the first step."""
        return (self.mean_square / (1 - BETA**self.steps)) ** 0.5 if self.steps else 0.0
