"""Coordinates that are kept apart from the weights, float32 and zero at first, until a fold writes them in.

    θ(ξ) = θ + f(ξ)         fold:  θ ← θ + f(ξ),  ξ ← 0

What a fold writes is rounded stochastically where the weights are half precision or quantised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from zo_hf.directions import Distribution, Purpose, Stream
from zo_hf.quantization import quantized_layers
from zo_hf.sharding import gather, is_sharded, local_part, reshard
from zo_hf.subspaces.materialised import Materialised
from zo_hf.subspaces.rounding import draw_uniform
from zo_hf.subspaces.sites import Pattern, Site
from zo_hf.subspaces.subspace import StreamOf, Subspace

DEFAULT_FOLD_STEPS = 50


class Folded(Subspace):
    """What low-rank factors, a core, norms and scales have in common.

    A subclass fills `coordinates`, calls `_begin`, and says what a module's output and a folded weight are.

    Attributes:
        fold_steps: steps between folds; 0 never folds before the end.
        drawn_at: the step of the last fold.
        fold_error: root mean square of what the last fold rounded off the quantised weights, relative to theirs; None
            before a fold or without such weights.
    """

    def __init__(
        self,
        model: nn.Module,
        fold_steps: int | None,
        target_modules: Pattern = None,
        exclude_modules: Pattern = None,
        among: Iterable[Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        if fold_steps is None:
            fold_steps = 0 if quantized_layers(model) else DEFAULT_FOLD_STEPS
        self.fold_steps = fold_steps
        super().__init__(model, target_modules, exclude_modules, among, seed)
        self.drawn_at = 0
        self.fold_error: float | None = None

    def _begin(self) -> None:
        self._materialised = Materialised(self.coordinates)
        self._at_origin = True
        self._clean_is_stale = True
        self.draw_bases(0)

    @property
    def materialised(self) -> Materialised:
        return self._materialised

    @property
    def at_origin(self) -> bool:
        """Whether every coordinate is zero, so that the model's own weights are the current model."""
        return self._at_origin

    def set_origin(self) -> None:
        """Say that every coordinate is zero, so that the model's own weights are the current model."""
        self._at_origin = True

    def draw_bases(self, step: int) -> None:
        """Draw what is kept between folds, keyed by the step at which it begins to be used."""
        self.drawn_at = step

    def moved(self, module: nn.Module) -> bool:
        return bool(self.probes) or not self._at_origin

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        self._materialised.write_gradient(coefficients, stream_of, distribution)

    def coordinates_changed(self) -> None:
        self._at_origin, self._clean_is_stale = False, True

    def _enter_point(self, stream_of: StreamOf, distribution: Distribution) -> None:
        self._materialised.set_point(self.probes, stream_of, distribution)

    def _leave_point(self) -> None:
        self._clean_is_stale = True

    # Folding.

    def fold(self, step: int, decay: Mapping[str, float]) -> None:
        reshard(self.model)
        errors = []
        with torch.no_grad():
            for site in self.sites:
                factor = decay.get(site.name, 1.0)
                if site.layer is None:
                    part, first = local_part(site.parameter)
                    self._fold_into(part, first, site, step, factor)
                else:
                    errors.append(self._fold_quantized(site.layer.storage(), site, step, factor))
            for coordinate in self.coordinates.values():
                coordinate.zero_()
        if errors:
            error, weight = (sum(sums) for sums in zip(*errors, strict=True))
            self.fold_error = (error / weight) ** 0.5 if weight else 0.0
        self.draw_bases(step)
        self._at_origin, self._clean_is_stale = True, True

    def folded_state_dict(self, step: int, decay: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        reshard(self.model)
        sites = {id(site.parameter): site for site in self.sites}
        folded: dict[int, Tensor] = {}
        state = self._quantized_state(step, decay or {})
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name in state:
                continue
            if id(tensor) not in folded:
                part, first = local_part(tensor)
                site = sites.get(id(tensor))
                if site is not None:
                    # The processes exchange shards where these are.
                    part = part.to(part.device if is_sharded(tensor) else "cpu", copy=True)
                    self._fold_into(part, first, site, step, (decay or {}).get(site.name, 1.0))
                folded[id(tensor)] = gather(part, tensor)
            state[name] = folded[id(tensor)]
        return state

    @torch.no_grad()
    def _quantized_state(self, step: int, decay: Mapping[str, float]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for site in self.sites:
            if site.layer is not None:
                storage = {name: part.to("cpu", copy=True) for name, part in site.layer.storage().items()}
                self._fold_quantized(storage, site, step, decay.get(site.name, 1.0))
                prefix = site.name.removesuffix("weight")
                state |= {prefix + name: tensor for name, tensor in site.layer.state_entries(storage).items()}
        return state

    def base_state(self) -> dict[str, Tensor]:
        """The weights as of the last fold, by name; to be called by every process, see `gather`."""
        reshard(self.model)
        return {name: gather(local_part(tensor)[0], tensor) for name, tensor in self.base_tensors().items()}

    def base_tensors(self) -> dict[str, Tensor]:
        """The tensors that a fold writes, live, by name."""
        tensors: dict[str, Tensor] = {}
        for site in self.sites:
            if site.layer is None:
                tensors[site.name] = site.parameter
            else:
                prefix = site.name.removesuffix("weight")
                tensors |= {prefix + name: part for name, part in site.layer.storage().items()}
        return tensors

    def _fold_into(self, target: Tensor, first: int, site: Site, step: int, decay: float) -> None:
        """target ← decay · target + the coordinates' part, a tile of rows at a time.

        target: the parameter, or a copy of it on any device, contiguous; or some of its first dimension's slices.
        first: index in the parameter of target's first element.
        """
        raise NotImplementedError

    def _fold_quantized(self, storage: dict[str, Tensor], site: Site, step: int, decay: float) -> tuple[float, float]:
        """The same for a quantised weight's parts, live or copied.

        Returns:
            Sums over the weight of the squared rounding error and of the squared new weight.
        """
        layer = site.layer
        assert layer is not None
        stream = Stream(self.seed, step, purpose=Purpose.ROUNDING)
        columns, device = layer.shape[1], next(iter(storage.values())).device
        error, weight = 0.0, 0.0
        for start, stop in layer.tiles():
            rows = layer.dequantise(storage, start, stop).mul_(decay).add_(self._rows(site, start, stop).to(device))
            uniform = draw_uniform(stream, site.name, start * columns, stop * columns, device).view(rows.shape)
            layer.requantise(storage, start, stop, rows, uniform)
            weight += float(rows.double().square().sum())
            error += float((layer.dequantise(storage, start, stop) - rows).double().square().sum())
        return error, weight

    def _rows(self, site: Site, start: int, stop: int) -> Tensor:
        """Rows start..stop of what the coordinates add to a quantised weight, float32 (stop - start, n)."""
        raise NotImplementedError
