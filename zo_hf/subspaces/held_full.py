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
from zo_hf.subspaces.sites import Pattern, Site
from zo_hf.subspaces.subspace import StreamOf, Subspace, first_input


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
        groups = len(self.probes)
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and "weight" in holders:
            x = first_input(args, kwargs)
            if groups > 1 and x.ndim > 1 and x.shape[0] % groups == 0:
                return self._linear(module, holders, x)

        def parameters(group: int) -> dict[str, Tensor]:
            return {attribute: self._materialised.at_point(site.name)[group] for attribute, site in holders.items()}

        return run_groups(module, parameters, groups, self.rows_per_probe, args, kwargs)

    def _linear(self, module: nn.Linear, holders: Mapping[str, Site], x: Tensor) -> Tensor:
        """All probes in one product: a network of small layers is otherwise slow for the number of its calls.

        x: (probes · rows, ..., n) -> (probes · rows, ..., m)
        """
        weights = self._materialised.at_point(holders["weight"].name)
        output = x.reshape(len(weights), -1, x.shape[-1]) @ weights.transpose(1, 2)
        if "bias" in holders:
            output = output + self._materialised.at_point(holders["bias"].name)[:, None]
        elif module.bias is not None:
            output = output + module.bias
        return output.view(*x.shape[:-1], -1)

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        self._materialised.write_gradient(coefficients, stream_of, distribution)

    def _enter_point(self, stream_of: StreamOf, distribution: Distribution) -> None:
        self._materialised.set_point(self.probes, stream_of, distribution)
