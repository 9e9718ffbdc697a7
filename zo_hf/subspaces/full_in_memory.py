"""All weights as coordinates with a gradient in memory, for small networks and for rules that need the gradient.

    θ(ξ) = ξ        probe: a copy of the weights, moved; update: any torch optimizer, on the weights themselves

The option name is that of `Full`, which draws directions in tiles and never holds a gradient. This class replaces
`Full` if directions are single coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from zo_hf.directions import Distribution
from zo_hf.parallel.shards import is_sharded
from zo_hf.rng import StreamOf
from zo_hf.subspaces.blocks import CoordinateBlocks
from zo_hf.subspaces.functional import HALF
from zo_hf.subspaces.per_group import functional_call_per_group
from zo_hf.subspaces.sites import Pattern, Site
from zo_hf.subspaces.subspace import Subspace


class FullInMemory(Subspace):
    """Moves every selected parameter itself.

    Raises:
        ValueError: a parameter is half precision, in which small updates would be lost, or sharded.
    """

    name = "full"
    # The learning rate of the paper on coordinate descent (arXiv 2605.14373) for its image classifiers.
    default_learning_rate = 1e-2

    def __init__(
        self,
        model: nn.Module,
        target_modules: Pattern = None,
        exclude_modules: Pattern = None,
        among: Iterable[Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, target_modules, exclude_modules, among, seed)
        for site in self.sites:
            if site.parameter.dtype in HALF or is_sharded(site.parameter):
                what = "sharded" if is_sharded(site.parameter) else str(site.parameter.dtype).removeprefix("torch.")
                raise ValueError(
                    f"zo_subspace='full' along coordinates moves weights in place, but {site.name} is {what}; load "
                    "the model in float32 on every process, or use zo_subspace='norms'."
                )
            self.coordinates[site.name] = site.parameter
        self._coordinate_blocks = CoordinateBlocks(self.coordinates)

    def moved(self, module: nn.Module) -> bool:
        return bool(self.probes)

    def forward(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        holders = self._holders[module]
        points = {attribute: self._coordinate_blocks.at_point(site.name) for attribute, site in holders.items()}

        def parameters(group: int) -> dict[str, Tensor]:
            return {attribute: point[group] for attribute, point in points.items()}

        return functional_call_per_group(
            module, parameters, len(self.probes), self.rows_per_probe, args, kwargs, lambda: points
        )

    def _value_at_point(self, site: Site, parameter: Tensor) -> Tensor:
        return self._coordinate_blocks.at_point(site.name)[0]

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        self._coordinate_blocks.write_gradient(coefficients, stream_of, distribution)

    def _enter_point(self, stream_of: StreamOf, distribution: Distribution) -> None:
        self._coordinate_blocks.set_point(self.probes, stream_of, distribution)
