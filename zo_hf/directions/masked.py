"""Gaussian directions on chosen entries of the coordinates.

    z = m ⊙ g        m ∈ {0, 1}ᵈ,  g ~ N(0, I)

E[z zᵀ] = diag(m): the estimate is the gradient's part at the chosen entries, and the others never move.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zo_hf.directions.distribution import Distribution, Run
from zo_hf.directions.distributions import GAUSSIAN
from zo_hf.directions.draw import NoiseLayout
from zo_hf.directions.stream import Stream
from zo_hf.method import Method


class Masked(Distribution):
    """A subclass says which entries move."""

    def mask(self, name: str, values: Tensor, index: slice | Tensor) -> Tensor | None:
        """Which of `values` move, bool or float of their shape; None is all of them.

        Args:
            index: where they lie in tensor `name`: a slice of its elements, or numbers of its rows.
        """
        raise NotImplementedError

    def draw_layout(self, stream: Stream, layout: NoiseLayout, coordinates: Mapping[str, Tensor]) -> Tensor:
        z = layout.draw(stream, GAUSSIAN)
        for name, view in layout.views(z).items():
            values = coordinates[name].detach().reshape(-1)
            mask = self.mask(name, values, slice(0, len(values)))
            if mask is not None:
                view.mul_(mask.view(view.shape))
        return z

    def draw_slice(self, stream: Stream, name: str, start: int, values: Tensor) -> Tensor:
        z = GAUSSIAN.draw_slice(stream, name, start, values)
        mask = self.mask(name, values, slice(start, start + len(values)))
        return z if mask is None else z.mul_(mask)

    def draw_rows(self, stream: Stream, name: str, rows: Tensor, values: Tensor) -> Tensor:
        z = GAUSSIAN.draw_rows(stream, name, rows, values)
        mask = self.mask(name, values.detach()[rows], rows)
        return z if mask is None else z.mul_(mask)


class GivenMask(Masked):
    """Moves the entries that a mask chooses, e.g. those that a gradient was largest at (SensZOQ, arXiv 2406.02913).

    It is no name in options, and a trajectory does not hold it: pass the object itself as `ZerothOrder(direction=...)`.

    Args:
        run: what it draws for.
        masks: bool tensors of the coordinates' shapes, by name; a coordinate that is missing does not move.

    Raises:
        ValueError: a mask is of no coordinate, or has another shape, or chooses nothing.
    """

    name = "given_mask"
    about = Method("SensZOQ (2406.02913)", memory="d bits", needs="masks, from Python")

    def __init__(self, run: Run, masks: Mapping[str, Tensor]) -> None:
        coordinates = run.subspace.coordinates
        for name, mask in masks.items():
            if name not in coordinates or coordinates[name].shape != mask.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"masks has {mask.dtype} of shape {tuple(mask.shape)} for {name!r}; give bool tensors by the names and "
                    "of the shapes of the subspace's coordinates."
                )
        self._masks = {name: mask.to(coordinates[name].device) for name, mask in masks.items() if mask.any()}
        if not self._masks:
            raise ValueError("masks chooses no entry of any coordinate; leave zo_direction='gaussian'.")
        self._moving = sum(int(mask.sum()) for mask in self._masks.values())

    def mask(self, name: str, values: Tensor, index: slice | Tensor) -> Tensor | None:
        if name not in self._masks:
            return torch.zeros_like(values, dtype=torch.bool)
        mask = self._masks[name]
        return mask.reshape(-1)[index] if isinstance(index, slice) else mask[index]

    def moves(self, stream: Stream, name: str) -> bool:
        return name in self._masks

    def moving(self, stream: Stream, dimension: int) -> float:
        return self._moving
