"""Coordinates that stay apart from the weights, float32 and zero at first, until a fold adds them to the weights.

    θ(ξ) = θ + f(ξ)         fold:  θ ← θ + f(ξ),  ξ ← 0

The literature calls a fold a merge. It rounds stochastically if the weights are in half precision; `code_rounding` has
what it does with quantized ones.

Between folds a state dict holds θ + f(ξ), as the next fold would write it: while the subspace is attached, hooks of the
modules that hold moving parameters put it there.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zo_hf.directions import GAUSSIAN, Distribution
from zo_hf.offload import OffloadedWeight, Values, offloaded_weights
from zo_hf.parallel.absent import is_absent
from zo_hf.parallel.shards import gather, is_sharded, local_part, part_of, reshard, shard_like
from zo_hf.quantization import quantized_layers
from zo_hf.rng import Purpose, Stream, StreamOf
from zo_hf.subspaces.blocks import CoordinateBlocks
from zo_hf.subspaces.code_rounding import NewRows, Rounded, round_by_inputs, round_stochastically
from zo_hf.subspaces.sites import Pattern, Site, require_contiguous
from zo_hf.subspaces.subspace import Subspace, no_stream

DEFAULT_FOLD_STEPS = 50


class Folded(Subspace):
    """The common part of low-rank factors, a core, norms and scales.

    A subclass fills `coordinates`, calls `_begin`, and computes the outputs of modules and the folded weights.

    Args:
        model: the model with the parameters that move.
        fold_steps: number of steps between folds; 0 folds only at the end. None means 50, or 0 for a quantized model.
        target_modules: parameters that move, see `find_sites`.
        exclude_modules: parameters that do not move.
        among: if given, only these parameters may move, e.g. those of an optimizer.
        seed: seed of the run.

    Attributes:
        fold_steps: number of steps between folds; 0 folds only at the end.
        drawn_at: step of the last fold.
        next_fold: step and decay, see `fold`, of a fold that would take place now; the engine keeps it up to date.
        fold_error: root mean square of the last fold's rounding errors on quantized weights, relative to that of the
            weights. It is None before a fold and without quantized weights.
    """

    moves_offloaded = True
    #: Rounding of quantized weights: stochastic or gptq, see `code_rounding`.
    fold_rounding = "stochastic"

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
        require_contiguous(self.sites)
        self.drawn_at = 0
        self.next_fold: tuple[int, Mapping[str, float]] = (0, {})
        self.fold_error: float | None = None
        self._state_dict_hooks: list[RemovableHandle] = []
        # Key of a site's last entry in a state dict, and the entry, which the other names of a tied weight share.
        self._last_entry: dict[str, tuple[str, weakref.ref[Tensor]]] = {}
        self._writes_before: dict[OffloadedWeight, int] = {}  # of a fold that has begun
        # Quantized weights that a fold would write, and the step and decay of that fold.
        self._new_codes: tuple[tuple[int, Mapping[str, float]], dict[str, Rounded]] | None = None
        for site in self.sites:
            if site.offloaded is not None:
                site.offloaded.reserve()

    def _begin(self) -> None:
        self._coordinate_blocks = CoordinateBlocks(self.coordinates)
        self._at_origin = True
        self._clean_is_stale = True
        self.draw_bases(0)

    @property
    def coordinate_blocks(self) -> CoordinateBlocks:
        return self._coordinate_blocks

    @property
    def at_origin(self) -> bool:
        """True if every coordinate is zero, so that the weights of the model are the current model."""
        return self._at_origin

    def set_origin(self) -> None:
        """Declare every coordinate to be zero, so that the weights of the model are the current model."""
        self._at_origin = True

    def draw_bases(self, step: int) -> None:
        """Draw the tensors that stay fixed between folds, keyed by the step from which they are used."""
        self.drawn_at, self._new_codes = step, None

    @property
    def is_moved(self) -> bool:
        return bool(self.probes) or not self._at_origin

    def moved(self, module: nn.Module) -> bool:
        return self.is_moved

    def _refresh_point(self) -> None:
        """Set the point to the coordinates themselves, for a forward pass outside of probes."""
        if not self.probes and self._clean_is_stale:
            self._coordinate_blocks.set_point((), no_stream, GAUSSIAN)
            self._clean_is_stale = False

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        self._coordinate_blocks.write_gradient(coefficients, stream_of, distribution)

    def coordinates_changed(self) -> None:
        self._at_origin, self._clean_is_stale, self._new_codes = False, True, None

    def _enter_point(self, stream_of: StreamOf, distribution: Distribution) -> None:
        self._coordinate_blocks.set_point(self.probes, stream_of, distribution)

    def _leave_point(self) -> None:
        self._clean_is_stale = True

    # The state dict of the model.

    def attach(self) -> None:
        super().attach()
        self._hook_state_dicts()

    def _hook_state_dicts(self) -> None:
        """Register the hooks that put the current weights into state dicts."""
        sites = {id(site.parameter): site for site in self.sites}
        for module in self.model.modules():
            held = {name: sites[id(p)] for name, p in module._parameters.items() if id(p) in sites}
            if held:
                # A partial of a function, so that a deep copy of the model gets hooks that refer to the copy.
                hook = functools.partial(_put_present_weights, self, held)
                self._state_dict_hooks.append(module.register_state_dict_post_hook(hook))

    def detach(self) -> None:
        super().detach()
        for handle in self._state_dict_hooks:
            handle.remove()
        self._state_dict_hooks.clear()

    def _put_present_weights(
        self, held: Mapping[str, Site], module: nn.Module, state: dict[str, Any], prefix: str
    ) -> None:
        """Replace a module's weights in a state dict by those that a fold would write now."""
        step, decay = self.next_fold
        if self._at_origin and step == 0:
            return
        if any(site.layer is not None for site in held.values()):
            self._round_codes(step, decay)
        for name, site in held.items():
            key = prefix + name
            # With keep_vars=True the caller asks for the parameters themselves.
            if key not in state or state[key] is module._parameters[name] or is_absent(site.parameter):
                continue
            last_key, last = self._last_entry.get(site.name, ("", None))
            tensor = None if last is None else last()
            if tensor is not None and state.get(last_key) is tensor:
                state[key] = tensor
                continue
            entries = self._present(site, name, step, decay.get(site.name, 1.0))
            state |= {prefix + part: value for part, value in entries.items()}
            self._last_entry[site.name] = key, weakref.ref(state[key])

    def _present(self, site: Site, name: str, step: int, decay: float) -> dict[str, Tensor]:
        """Return what a fold would write, on the weight's device, or on the CPU if there is no memory for it."""
        device = site.device
        try:
            return self._folded(site, name, step, decay, device)
        except torch.OutOfMemoryError:
            return self._folded(site, name, step, decay, torch.device("cpu"))

    # Folding.

    def fold(self, step: int, decay: Mapping[str, float]) -> None:
        reshard(self.model)
        errors = []
        self._round_codes(step, decay)
        with torch.no_grad():
            for targets in self._targets():
                self._fold_plain(targets, step, decay)
            self._writes_before.clear()
            for site in self.sites:
                if site.layer is not None:
                    factor = decay.get(site.name, 1.0)
                    errors.append(self._fold_quantized(site.layer.storage(), site, step, factor))
            torch._foreach_zero_(list(self.coordinates.values()))
        if errors:
            error, weight = (sum(sums) for sums in zip(*errors, strict=True))
            self.fold_error = (error / weight) ** 0.5 if weight else 0.0
        self.draw_bases(step)
        self._at_origin, self._clean_is_stale = True, True

    def folded_state_dict(self, step: int, decay: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        reshard(self.model)
        decay, cpu = decay or {}, torch.device("cpu")
        self._round_codes(step, decay)
        state: dict[str, Tensor] = {}
        plain: dict[int, Site] = {}
        weights, named = offloaded_weights(self.model), self.model.state_dict(keep_vars=True)
        values = Values(weights, named)
        for site in self.sites:
            if site.layer is None:
                plain[id(site.parameter)] = site
            else:
                entries = self._folded(site, "weight", step, decay.get(site.name, 1.0), cpu)
                state |= {site.name.removesuffix("weight") + part: tensor for part, tensor in entries.items()}
        done: dict[int, Tensor] = {}
        for name, tensor in named.items():
            if name in state:
                continue
            if id(tensor) not in done:
                owner = plain.get(id(tensor))
                if owner is None:
                    value = values[name]
                else:
                    value = self._folded(owner, name, step, decay.get(owner.name, 1.0), cpu)[name]
                done[id(tensor)] = gather(local_part(value)[0], tensor)
            state[name] = done[id(tensor)]
        return state

    @torch.no_grad()
    def _folded(self, site: Site, name: str, step: int, decay: float, device: torch.device) -> dict[str, Tensor]:
        """Return copies with what a fold would write.

        Args:
            site: site of the parameter.
            name: key of the copy; those of a quantized weight's parts are the format's.
            step: step of the fold.
            decay: factor on the old weight.
            device: device of the copies; a shard stays where it is, because processes exchange shards there, and an
                offloaded weight on the CPU.
        """
        if site.layer is not None:
            storage = {key: part.to(device, copy=True) for key, part in site.layer.storage().items()}
            self._fold_quantized(storage, site, step, decay)
            return site.layer.state_entries(storage)
        if site.offloaded is not None:
            copy = site.offloaded.copy()
            self._fold_into(copy, 0, site, step, decay)
            return {name: copy}
        if is_absent(site.parameter):
            return {name: site.parameter.detach()}
        part, first = local_part(site.parameter)
        sharded = is_sharded(site.parameter)
        part = part.to(part.device if sharded else device, copy=True)
        self._fold_into(part, first, site, step, decay)
        return {name: shard_like(part, site.parameter) if sharded else part}

    def base_state(self) -> dict[str, Tensor]:
        """Return the weights as of the last fold, by name. Every process must call this method, see `gather`."""
        reshard(self.model)
        offloaded = {site.name: site.offloaded for site in self.sites if site.offloaded is not None}
        return {
            name: offloaded[name].kept() if name in offloaded else gather(local_part(tensor)[0], tensor)
            for name, tensor in self.base_tensors().items()
        }

    @torch.no_grad()
    def load_base(self, base: Mapping[str, Tensor]) -> None:
        """Write the weights as of the last fold, by name."""
        offloaded = {site.name: site.offloaded for site in self.sites if site.offloaded is not None}
        for name, tensor in self.base_tensors().items():
            if name in offloaded:
                offloaded[name].write(base[name])
            elif not is_absent(tensor):
                local_part(tensor)[0].copy_(part_of(base[name], tensor))

    def base_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a fold writes, live, by name; offloaded ones are on the meta device."""
        tensors: dict[str, Tensor] = {}
        for site in self.sites:
            if site.layer is None:
                tensors[site.name] = site.parameter
            else:
                prefix = site.name.removesuffix("weight")
                tensors |= {prefix + name: part for name, part in site.layer.storage().items()}
        return tensors

    def _targets(self) -> Iterator[list[tuple[Site, Tensor]]]:
        """Yield the sites that are not quantized with the tensors that a fold writes: block by block, then those in memory.

        A fold that an error has ended, as of a disk, leaves out the weights that it has written when it is called again.
        """
        sites = {site.offloaded: site for site in self.sites if site.offloaded is not None}
        self._writes_before = self._writes_before or {weight: weight.writes for weight in sites}
        if self.loader is not None:
            unwritten = [weight for weight, writes in self._writes_before.items() if weight.writes == writes]
            for values in self.loader.rewrite(unwritten):
                yield [(sites[weight], value) for weight, value in values.items()]
        plain = (site for site in self.sites if site.layer is None and site.offloaded is None)
        yield [(site, site.parameter) for site in plain if not is_absent(site.parameter)]

    def _fold_plain(self, targets: Iterable[tuple[Site, Tensor]], step: int, decay: Mapping[str, float]) -> None:
        """Fold into the tensors of sites that are not quantized; the other arguments are those of `fold`."""
        for site, tensor in targets:
            part, first = local_part(tensor)
            self._fold_into(part, first, site, step, decay.get(site.name, 1.0))

    def _fold_into(self, target: Tensor, first: int, site: Site, step: int, decay: float) -> None:
        """Set target to decay · target + f(ξ), a tile of rows at a time.

        Args:
            target: the parameter, or a contiguous copy of it on any device, or some slices of its first dimension.
            first: index of the target's first element in the parameter.
            site: site of the parameter.
            step: step of the fold, which keys the rounding.
            decay: factor on the old weight.
        """
        raise NotImplementedError

    def _fold_quantized(self, storage: dict[str, Tensor], site: Site, step: int, decay: float) -> tuple[float, float]:
        """Do the same for the parts of a quantized weight, live or copied.

        Returns:
            The sum of the squared rounding errors over the weight, and the sum of its squared new values.
        """
        assert site.layer is not None
        rounded = None if self._new_codes is None else self._new_codes[1].get(site.name)
        if rounded is not None:
            return rounded.write(storage)
        stream = Stream(self.seed, step, purpose=Purpose.ROUNDING)
        return round_stochastically(storage, site.layer, self._new_rows(site, decay), site.name, stream)

    @torch.no_grad()
    def _round_codes(self, step: int, decay: Mapping[str, float]) -> None:
        """Round the quantized weights that a fold would write if it takes the inputs of all layers; else do nothing."""
        key = step, dict(decay)
        is_known = self._new_codes is not None and self._new_codes[0] == key
        if self.fold_rounding != "gptq" or is_known or (self._at_origin and not decay):
            return
        sites = [site for site in self.sites if site.layer is not None]

        def new_rows(site: Site) -> NewRows:
            return self._new_rows(site, decay.get(site.name, 1.0))

        self._new_codes = key, round_by_inputs(self.model, sites, new_rows, self.seed, step)

    def _new_rows(self, site: Site, decay: float) -> NewRows:
        """Return a function that decodes rows of a quantized weight and adds what a fold adds to them."""
        layer = site.layer
        assert layer is not None

        def rows(storage: dict[str, Tensor], start: int, stop: int) -> Tensor:
            decoded = layer.dequantize(storage, start, stop)
            return decoded.mul_(decay).add_(self._rows(site, start, stop).to(decoded.device))

        return rows

    def _rows(self, site: Site, start: int, stop: int) -> Tensor:
        """Return rows start to stop - 1 of f(ξ) for a quantized weight, float32 (stop - start, n)."""
        raise NotImplementedError


def _put_present_weights(
    subspace: Folded, held: Mapping[str, Site], module: nn.Module, state: dict[str, Any], prefix: str, _: Any
) -> None:
    subspace._put_present_weights(held, module, state, prefix)
