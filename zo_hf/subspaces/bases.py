"""The bases V of low-rank factors: where they lie, and in which dtype.

A new draw is written into the old one, because CUDA graphs know it by its address.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zo_hf.rng import NoiseLayout
from zo_hf.subspaces.factors import width_of


class Bases:
    """V / √r of every matrix, (n, r), by name.

    Args:
        rank: r.
        dtype_of: gives the dtype of a basis, by name.
    """

    def __init__(self, rank: int, dtype_of: Callable[[str], torch.dtype]) -> None:
        self._rank, self._dtype_of = rank, dtype_of
        self._bases: dict[str, Tensor] = {}
        self._wide_bases: dict[str, Tensor] = {}
        self._wide: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._bases[name]

    def wide(self, name: str) -> Tensor:
        """Return a basis with columns of zeros up to the width of factors, see `factors`; `take_all` must have set it."""
        return self._wide_bases[name]

    def take(self, name: str, basis: Tensor) -> None:
        """Take a basis of any floating-point dtype, (n, r)."""
        rounded = basis.to(self._dtype_of(name))
        if name in self._bases:
            self._bases[name].copy_(rounded)
            return
        # Column-major, because this makes x · V about five times faster on a CPU.
        self._bases[name] = rounded.t().contiguous().t()

    def take_all(self, layout: NoiseLayout, flat: Tensor) -> None:
        """Take all bases of a layout from a flat vector, with room for the width of factors."""
        rows = flat.view(-1, self._rank)
        for dtype in {self._dtype_of(name) for name in layout.shapes}:
            wide = self._wide.get((rows.device, dtype))
            if wide is None:
                wide = rows.new_zeros(len(rows), width_of(self._rank), dtype=dtype)
                self._wide[rows.device, dtype] = wide
            wide[:, : self._rank].copy_(rows)
        for name, shape in layout.shapes.items():
            start = layout.offsets[name] // self._rank
            self._wide_bases[name] = self._wide[rows.device, self._dtype_of(name)][start : start + shape[0]]
            self._bases[name] = self._wide_bases[name][:, : self._rank]

    def tensors(self) -> list[Tensor]:
        """Return the tensors that forward passes read."""
        return [*self._bases.values(), *self._wide.values()]
