"""Gaussian directions on some entries of the coordinates.

    z = m ⊙ g        m ∈ {0, 1}ᵈ,  g ~ N(0, I)

E[z zᵀ] = diag(m): on average an estimate is the gradient at the chosen entries, and the others never move.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zo_hf.directions.distribution import DirectionContext, Distribution
from zo_hf.directions.distributions import GAUSSIAN
from zo_hf.method_info import Method
from zo_hf.rng.draw import NoiseLayout
from zo_hf.rng.stream import Stream


class Masked(Distribution):
    """Gaussian directions times a mask; a subclass computes the mask."""

    def mask(self, name: str, values: Tensor, index: slice | Tensor) -> Tensor | None:
        """Return the mask of `values`, bool or float of their shape; None lets all of them move.

        Args:
            name: name of the coordinate tensor.
            values: some elements of that tensor.
            index: position of `values` in the tensor: a slice of its elements, or numbers of its rows.
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
    """Moves the entries that a mask chooses, e.g. those with the largest gradients (SensZOQ, arXiv 2406.02913).

    No option names it, and a trajectory does not store the masks: pass the object as `ZerothOrder(direction=...)`.

    Args:
        context: facts about the run.
        masks: bool tensors of the coordinates' shapes, by name; a coordinate without a mask does not move.

    Raises:
        ValueError: a mask fits no coordinate by name, shape and dtype, or no mask chooses an entry.
    """

    name = "given_mask"
    about = Method("SensZOQ (2406.02913)", memory="d bits", needs="masks passed from Python")

    def __init__(self, context: DirectionContext, masks: Mapping[str, Tensor]) -> None:
        coordinates = context.coordinates
        for name, mask in masks.items():
            if name not in coordinates or coordinates[name].shape != mask.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"masks has {mask.dtype} of shape {tuple(mask.shape)} for {name!r}; give bool tensors with the "
                    "names and shapes of the subspace's coordinates."
                )
        self._masks = {name: mask.to(coordinates[name].device) for name, mask in masks.items() if mask.any()}
        if not self._masks:
            raise ValueError("masks chooses no entry of any coordinate; use zo_direction='gaussian' to move all.")
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
