"""Parameters of one dimension at the points of all groups, θ + ξ + ε·z, made once a pass by three kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_hf.parallel.shards import is_sharded
from zo_hf.subspaces.blocks import CoordinateBlock
from zo_hf.subspaces.sites import Site


class MovedVectors:
    """The vectors in one block of coordinates.

    Args:
        block: the coordinates; its matrices come before its vectors.
        sites: sites of coordinates in the block. Those that are no whole vectors are left out.
    """

    def __init__(self, block: CoordinateBlock, sites: Sequence[Site]) -> None:
        self._block = block
        self._parameters = {
            site.name: site.parameter
            for site in sites
            if len(site.shape) == 1 and not is_sharded(site.parameter) and site.offloaded is None
        }
        offsets = block.layout.offsets
        self._first = min((offsets[name] for name in self._parameters), default=0)
        self._made: Tensor | None = None
        self._weights: Tensor | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def refresh(self) -> None:
        """Take the block's new points and the present parameters, if any have been asked for."""
        if self._made is not None:
            self._made = self._fill()

    def of(self, name: str) -> Tensor:
        """Return a parameter at every point, (groups, d), in the dtype of the coordinates."""
        if self._made is None:
            self._made = self._fill()
        return self._of(self._made, name)

    def _fill(self) -> Tensor:
        point = self._block.point
        assert point is not None
        vectors = point[:, self._first :]
        if self._weights is None:
            self._weights = vectors.new_zeros(vectors.shape[1])
        views = [self._of(self._weights, name) for name in self._parameters]
        torch._foreach_copy_(views, [parameter.detach() for parameter in self._parameters.values()])
        made = self._block.kept.of(len(point), "vectors", vectors.dtype, lambda: torch.empty_like(vectors))
        return torch.add(vectors, self._weights, out=made)

    def _of(self, vectors: Tensor, name: str) -> Tensor:
        start = self._block.layout.offsets[name] - self._first
        return vectors[..., start : start + len(self._parameters[name])]
