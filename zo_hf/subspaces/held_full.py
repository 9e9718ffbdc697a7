"""All weights as coordinates, with a gradient that is held: for networks small enough, and rules that need one.

    θ(ξ) = ξ        probe: a copy of the weights, moved; update: any torch optimizer, on the weights themselves

It goes by the name of `Full`, whose directions are drawn in tiles and whose gradient is never held, and takes its place
where directions are single coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from zo_hf.directions import Distribution
from zo_hf.sharding import is_sharded
from zo_hf.subspaces.materialised import Materialised
from zo_hf.subspaces.shadow import HALF, run_groups
from zo_hf.subspaces.sites import Pattern
from zo_hf.subspaces.subspace import StreamOf, Subspace


class HeldFull(Subspace):
    """Moves every selected parameter itself.

    Raises:
        ValueError: a parameter is half precision, in which small updates would be lost, or sharded.
    """

    name = "full"
    # The paper's of coordinate descent (arXiv 2605.14373) for its image classifiers.
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
                    f"zo_subspace='full' along coordinates moves weights in place and {site.name} is {what}; load the model "
                    "in float32 on every process, or use zo_subspace='norms', whose coordinates are float32."
                )
            self.coordinates[site.name] = site.parameter
        self._materialised = Materialised(self.coordinates)

    def moved(self, module: nn.Module) -> bool:
        return bool(self.probes)

    def forward(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        holders = self._holders[module]

        def parameters(group: int) -> dict[str, Tensor]:
            return {attribute: self._materialised.at_point(site.name)[group] for attribute, site in holders.items()}

        return run_groups(module, parameters, len(self.probes), self.rows_per_probe, args, kwargs)

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        self._materialised.write_gradient(coefficients, stream_of, distribution)

    def _enter_point(self, stream_of: StreamOf, distribution: Distribution) -> None:
        self._materialised.set_point(self.probes, stream_of, distribution)
