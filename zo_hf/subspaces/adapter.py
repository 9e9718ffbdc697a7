"""The trainable weights of a PEFT model as coordinates: the adapter moves, and the base stays as it is.

θ(ξ) = (base, ξ)        with ξ the adapter's own tensors, perturbed densely

If a LoRA starts from zero, B·A with B = 0, only B moves unless the patterns select otherwise. Training then ends at a
lower loss and tolerates a larger learning rate (docs/peft.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.directions import Distribution
from zo_hf.method_info import Method
from zo_hf.offload import bring_in, check_values
from zo_hf.rng import Purpose, Stream, StreamOf
from zo_hf.rng.rounding import round_in_tiles
from zo_hf.subspaces.blocks import CoordinateBlocks
from zo_hf.subspaces.entries import forward_of
from zo_hf.subspaces.functional import HALF, held, run_upcast
from zo_hf.subspaces.peft_methods import (
    LORA_FROM_ZERO,
    begins_without_effect,
    family,
    is_weight_of_the_model,
    of_active_adapter,
    refuse_what_needs_gradients,
)
from zo_hf.subspaces.per_group import functional_call_per_group
from zo_hf.subspaces.sites import Pattern, Site, coordinate_dtype
from zo_hf.subspaces.subspace import Subspace


class Adapter(Subspace):
    """Moves every trainable parameter itself; meant for models with few of them.

    Half-precision adapter weights become float32, as in PEFT by default, so that small updates survive. If they belong
    to layers of the model (a new head, norms), these layers compute in float32 and get their dtype back after
    training.
    """

    name = "adapter"
    about = Method("MeZO with LoRA or prefixes (2305.17333)", memory="d for the gradient", needs="a PEFT model")

    def __init__(
        self,
        model: nn.Module,
        target_modules: Pattern = None,
        exclude_modules: Pattern = None,
        among: Iterable[Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        refuse_what_needs_gradients(model)
        check_values(model)
        bring_in(model, {name for name, parameter in model.named_parameters() if parameter.requires_grad})
        among = of_active_adapter(model) if among is None else among
        super().__init__(model, target_modules, exclude_modules, among, seed)
        self.default_eps, self.default_learning_rate = family(model).eps, family(model).learning_rate
        begins_still = begins_without_effect(model)
        if any(map(begins_still, self.start)) and not any(begins_still(site.name) for site in self.sites):
            self.default_learning_rate = LORA_FROM_ZERO.learning_rate
        held_in = [(site, _held(module, path)) for site in self.sites for module, path in site.uses]
        views = [(site, p) for site, p in held_in if site.as_held(p, p) is not p]
        for name, parameter in self.start.items():
            # Fixed weights of the adapter too, because moving weights are multiplied with them.
            if not is_weight_of_the_model(model, name):
                parameter.data = parameter.data.to(coordinate_dtype(parameter))
        self._half_dtypes: dict[nn.Module, torch.dtype] = {}
        for site in self.sites:
            dtype = site.parameter.dtype
            if dtype in HALF and is_weight_of_the_model(model, site.name):
                self._compute_in_float32(site, dtype)
            site.parameter.data = site.parameter.data.to(coordinate_dtype(site.parameter))
            self.coordinates[site.name] = site.parameter
        for site, view in views:
            view.data = site.parameter.data.t()
        self._coordinate_blocks = CoordinateBlocks(self.coordinates)

    def _find_sites(self, among: Iterable[Tensor] | None) -> list[Site]:
        sites = super()._find_sites(among)
        if self.target_modules is not None or self.exclude_modules is not None:
            return sites
        stays = begins_without_effect(self.model)
        return [site for site in sites if not stays(site.name)] or sites

    @property
    def coordinate_blocks(self) -> CoordinateBlocks:
        return self._coordinate_blocks

    @property
    def start(self) -> dict[str, nn.Parameter]:
        """All weights that PEFT has made trainable, even those that stay fixed: PEFT draws some of them at random."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _compute_in_float32(self, site: Site, dtype: torch.dtype) -> None:
        """Make a half-precision layer of the model compute in float32; PEFT's own layers accept any dtype."""
        for module, _ in site.uses:
            if next(module.children(), None) is not None:
                raise ValueError(
                    f"{site.name} is {dtype} in a layer with child modules, where small updates would be lost; load "
                    "the model in float32."
                )
            self._half_dtypes[module] = dtype

    def detach(self) -> None:
        super().detach()
        for site in self.sites:
            for module, _ in site.uses:
                if module in self._half_dtypes and site.parameter.dtype != self._half_dtypes[module]:
                    # Rounding to nearest would lose every change of less than half a unit in the last place.
                    stream = Stream(self.seed, purpose=Purpose.ROUNDING)
                    half = self._half_dtypes[module]
                    site.parameter.data = round_in_tiles(site.parameter.data, half, stream, site.name)

    @property
    def takes_groups_cheaply(self) -> bool:
        # Other modules of PEFT call their base layer once for each group, or make a weight of its size.
        def in_one_call(module: nn.Module) -> bool:
            are_vectors = all(len(site.shape) == 1 for site in self._holders[module].values())
            return forward_of(module) is nn.Linear.forward or (are_vectors and not list(module.children()))

        return all(map(in_one_call, self._holders))

    @property
    def is_moved(self) -> bool:
        return bool(self.probes or self._half_dtypes)

    def _read_dtype(self, module: nn.Module, parameter: Tensor) -> torch.dtype:
        return self._half_dtypes.get(module, parameter.dtype)

    def moved(self, module: nn.Module) -> bool:
        return bool(self.probes) or module in self._half_dtypes

    def forward(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        if module in self._half_dtypes:
            return run_upcast(partial(self._forward, module, original), self._half_dtypes[module], args, kwargs)
        return self._forward(module, original, args, kwargs)

    def _forward(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        if not self.probes:
            return original(*args, **kwargs)
        holders = self._holders[module]
        held_in = {path: _held(module, path) for path in holders}
        points = {path: self._coordinate_blocks.at_point(site.name) for path, site in holders.items()}

        def parameters(group: int) -> dict:
            return {path: holders[path].as_held(point[group], held_in[path]) for path, point in points.items()}

        are_as_held = all(held_in[path].shape == site.shape for path, site in holders.items())
        return functional_call_per_group(
            module,
            parameters,
            len(self.probes),
            self.rows_per_probe,
            args,
            kwargs,
            (lambda: points) if are_as_held else None,
        )

    def _value_at_point(self, site: Site, parameter: Tensor) -> Tensor:
        if not self.probes:
            return parameter.detach()
        return site.as_held(self._coordinate_blocks.at_point(site.name)[0], parameter)

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        self._coordinate_blocks.write_gradient(coefficients, stream_of, distribution)

    def _enter_point(self, stream_of: StreamOf, distribution: Distribution) -> None:
        self._coordinate_blocks.set_point(self.probes, stream_of, distribution)


def _held(module: nn.Module, path: str) -> Tensor:
    parameter = held(module, path)
    assert parameter is not None
    return parameter
