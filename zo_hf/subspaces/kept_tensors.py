"""The tensors that hold points, made again when the number of points changes, or kept for every number.

A CUDA graph reads the addresses that it was captured with, whatever lies there later. Between its replays an evaluation has
another number of points, and would give their room away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class KeptTensors:
    """Tensors by the number of points that they hold, and by a name.

    Attributes:
        stay: True keeps those of every number where they are; False keeps those of the last number alone.
    """

    def __init__(self) -> None:
        self.stay = False
        self._made: dict[tuple[int, str, torch.dtype], Tensor] = {}

    def of(self, points: int, name: str, dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        """Return the tensor of this name, with the values that it was left with, or else a new one.

        Args:
            points: number of points.
            name: what it holds of them.
            dtype: its dtype.
            make: makes a new one.
        """
        key = points, name, dtype
        if key not in self._made:
            if not self.stay:
                self._made = {other: tensor for other, tensor in self._made.items() if other[0] == points}
            self._made[key] = make()
        return self._made[key]

    def holding(self, points: int) -> list[Tensor]:
        """Return those of a number of points."""
        return [tensor for key, tensor in self._made.items() if key[0] == points]
