"""The trainable weights of a PEFT model as coordinates: adapters move, the base stays.

θ(ξ) = (base, ξ)        with ξ the adapter's own tensors, perturbed densely

Of a LoRA that begins at zero, B·A with B = 0, only B moves unless the patterns select otherwise: it ends lower and bears a
larger learning rate (docs/peft.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.directions import Distribution, Purpose, Stream
from zo_hf.method import Method
from zo_hf.subspaces.materialised import Materialised
from zo_hf.subspaces.peft_methods import (
    LORA_FROM_ZERO,
    begins_without_effect,
    family,
    is_weight_of_the_model,
    of_active_adapter,
    refuse_what_needs_gradients,
)
from zo_hf.subspaces.rounding import draw_uniform, stochastic_round
from zo_hf.subspaces.shadow import HALF, run_groups, run_upcast
from zo_hf.subspaces.sites import Pattern, Site, coordinate_dtype
from zo_hf.subspaces.subspace import StreamOf, Subspace


class Adapter(Subspace):
    """Moves every trainable parameter itself; meant for models in which these are few.

    Half-precision adapter weights become float32, as PEFT itself makes them by default, so that small updates survive.
    Where they are layers of the model (a new head, norms), these compute in float32 and are as before after training.
    """

    name = "adapter"
    about = Method("MeZO with LoRA or prefixes (2305.17333)", memory="gradient d", needs="a PEFT model")

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
        if any(begins_without_effect(model)(name) for name in self.start.keys() - {site.name for site in self.sites}):
            self.default_learning_rate = LORA_FROM_ZERO.learning_rate
        for name, parameter in self.start.items():
            if not is_weight_of_the_model(model, name):  # what stays, too: it is multiplied with what moves
                parameter.data = parameter.data.to(coordinate_dtype(parameter))
        self._narrow: dict[nn.Module, torch.dtype] = {}
        for site in self.sites:
            dtype = site.parameter.dtype
            if dtype in HALF and is_weight_of_the_model(model, site.name):
                self._keep_narrow(site, dtype)
            site.parameter.data = site.parameter.data.to(coordinate_dtype(site.parameter))
            self.coordinates[site.name] = site.parameter
        self._materialised = Materialised(self.coordinates)

    def _find_sites(self, among: Iterable[Tensor] | None) -> list[Site]:
        sites = super()._find_sites(among)
        if self.target_modules is not None or self.exclude_modules is not None:
            return sites
        stays = begins_without_effect(self.model)
        return [site for site in sites if not stays(site.name)] or sites

    @property
    def materialised(self) -> Materialised:
        return self._materialised

    @property
    def start(self) -> dict[str, nn.Parameter]:
        """All weights that PEFT has made trainable, those that stay included: an adapter begins with what it draws."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _keep_narrow(self, site: Site, dtype: torch.dtype) -> None:
        """PEFT's own layers take inputs of any dtype; a layer of the model has to be told."""
        for module, _ in site.uses:
            if next(module.children(), None) is not None:
                raise ValueError(
                    f"{site.name} is {dtype} in a layer that holds others, and small updates of it would be lost; load "
                    "the model in float32."
                )
            self._narrow[module] = dtype

    def detach(self) -> None:
        super().detach()
        for site in self.sites:
            for module, _ in site.uses:
                if module in self._narrow and site.parameter.dtype != self._narrow[module]:
                    # Rounded to the nearest, what was learnt would be lost where it is less than half a place.
                    stream = Stream(self.seed, purpose=Purpose.ROUNDING)
                    value = site.parameter.data
                    uniform = draw_uniform(stream, site.name, 0, value.numel(), value.device).view(value.shape)
                    site.parameter.data = stochastic_round(value, self._narrow[module], uniform)

    def moved(self, module: nn.Module) -> bool:
        return bool(self.probes) or module in self._narrow

    def forward(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        if module in self._narrow:
            return run_upcast(partial(self._forward, module, original), self._narrow[module], args, kwargs)
        return self._forward(module, original, args, kwargs)

    def _forward(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        if not self.probes:
            return original(*args, **kwargs)
        holders = self._holders[module]

        def parameters(group: int) -> dict:
            return {attribute: self._materialised.at_point(site.name)[group] for attribute, site in holders.items()}

        return run_groups(module, parameters, len(self.probes), self.rows_per_probe, args, kwargs)

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        self._materialised.write_gradient(coefficients, stream_of, distribution)

    def _enter_point(self, stream_of: StreamOf, distribution: Distribution) -> None:
        self._materialised.set_point(self.probes, stream_of, distribution)
