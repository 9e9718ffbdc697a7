"""The trainable weights of a PEFT model as coordinates: adapters move, the base stays.

θ(ξ) = (base, ξ)        with ξ the adapter's own tensors, perturbed densely
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from zo_hf.directions import Distribution
from zo_hf.subspaces.materialised import Materialised
from zo_hf.subspaces.peft_methods import family, of_active_adapter, refuse_what_needs_gradients
from zo_hf.subspaces.shadow import run_groups
from zo_hf.subspaces.sites import Pattern, coordinate_dtype
from zo_hf.subspaces.subspace import StreamOf, Subspace


class Adapter(Subspace):
    """Moves every trainable parameter itself; meant for models in which these are few.

    Half-precision adapter weights become float32, as PEFT itself makes them by default, so that small updates survive.
    """

    name = "adapter"

    def __init__(
        self,
        model: nn.Module,
        target_modules: Pattern = None,
        exclude_modules: Pattern = None,
        among: Iterable[Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        refuse_what_needs_gradients(model)
        among = of_active_adapter(model) if among is None else among
        super().__init__(model, target_modules, exclude_modules, among, seed)
        self.default_eps, self.default_learning_rate = family(model).eps, family(model).learning_rate
        for site in self.sites:
            site.parameter.data = site.parameter.data.to(coordinate_dtype(site.parameter))
            self.coordinates[site.name] = site.parameter
        self._materialised = Materialised(self.coordinates)

    def moved(self, module: nn.Module) -> bool:
        return bool(self.probes)

    def forward(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        holders = self._holders[module]

        def parameters(group: int) -> dict:
            return {attribute: self._materialised.at_point(site.name)[group] for attribute, site in holders.items()}

        return run_groups(module, parameters, len(self.probes), self.rows_per_probe, args, kwargs)

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        self._materialised.write_gradient(coefficients, stream_of, distribution)

    def _enter_point(self, stream_of: StreamOf, distribution: Distribution) -> None:
        self._materialised.set_point(self.probes, stream_of, distribution)
