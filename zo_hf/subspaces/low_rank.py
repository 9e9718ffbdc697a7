"""Low-rank coordinates: a short matrix of numbers for every weight matrix, a number for every 1-D parameter.

After LOZO (Chen et al., arXiv 2410.07698), with the low-rank term inside the forward as in EGGROLL (arXiv 2511.16652):

    W(B) = W + B · Vᵀ / √r         B: (m, r), the coordinates, float32, zero after a fold
                                   V: (n, r), standard normal from the seed, kept for `fold_steps` steps
    probe:  y = x · Wᵀ + (x · V/√r) · (B ± εU)ᵀ       U: (m, r), the direction
    fold:   W ← W + B · Vᵀ / √r,   B ← 0,   V ← a new draw

An entry of U · Vᵀ / √r has unit variance, so ε and the learning rate mean what they mean for a dense direction.
A probe costs two thin products beside x · Wᵀ: no pass over W, whatever format W is stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zo_hf.directions import GAUSSIAN, Distribution, NoiseLayout, Purpose, Stream
from zo_hf.sharding import gather, is_sharded, local_part, reshard
from zo_hf.subspaces.materialised import Materialised
from zo_hf.subspaces.rounding import TILE, draw_uniform, stochastic_round
from zo_hf.subspaces.shadow import HALF, held, run_groups
from zo_hf.subspaces.sites import Pattern, Site, coordinate_dtype
from zo_hf.subspaces.subspace import StreamOf, Subspace, first_input, require_equal_parts

_LINEAR = (nn.Linear.forward, Conv1D.forward)


class LowRank(Subspace):
    """See the formula above.

    Args:
        model: the model whose parameters move.
        rank: r.
        fold_steps: steps between folds (ν); 0 never folds.
        target_modules: which parameters move, see `find_sites`.
        exclude_modules: which do not.
        among: only these parameters may move, e.g. those an optimizer was built for.
        seed: the run's seed.
    """

    name = "low_rank"

    def __init__(
        self,
        model: nn.Module,
        rank: int = 4,
        fold_steps: int = 50,
        target_modules: Pattern = None,
        exclude_modules: Pattern = None,
        among: Iterable[Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, target_modules, exclude_modules, among, seed)
        self.rank, self.fold_steps = rank, fold_steps
        self.factored: dict[str, Site] = {}
        for site in self.sites:
            p = site.parameter
            shape = p.shape
            if p.ndim >= 2 and site.matrix_shape[1] > rank:
                self.factored[site.name] = site
                shape = torch.Size((site.matrix_shape[0], rank))
            zeros = torch.zeros(shape, dtype=coordinate_dtype(p), device=p.device)
            self.coordinates[site.name] = nn.Parameter(zeros)
        self._materialised = Materialised(self.coordinates)
        self._at_origin = True
        self._clean_is_stale = True
        self._bases: dict[str, Tensor] = {}
        self.draw_bases(0)

    def draw_bases(self, step: int) -> None:
        """Draw V / √r for every matrix, (n, r), keyed by the step at which it begins to be used."""
        self.drawn_at = step
        by_device: dict[torch.device, dict[str, torch.Size]] = {}
        for name, site in self.factored.items():
            shape = torch.Size((site.matrix_shape[1], self.rank))
            by_device.setdefault(site.parameter.device, {})[name] = shape
        stream = Stream(self.seed, step, purpose=Purpose.BASIS)
        for device, shapes in by_device.items():
            layout = NoiseLayout(shapes, device)
            flat = layout.draw(stream, GAUSSIAN).mul_(self.rank**-0.5)
            for name, view in layout.views(flat).items():
                # The forward multiplies by V in the weight's dtype; the fold must add the same V.
                dtype = self.factored[name].parameter.dtype
                basis = view.to(dtype if dtype in HALF else self.coordinates[name].dtype)
                # Columns one after another in memory: on a CPU x · V is then about five times faster.
                self._bases[name] = basis.t().contiguous().t()

    def basis(self, name: str) -> Tensor:
        """V / √r of one matrix, (n, r)."""
        return self._bases[name]

    def moved(self, module: nn.Module) -> bool:
        return bool(self.probes) or not self._at_origin

    def forward(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        if not self.probes and self._clean_is_stale:
            self._materialised.set_point((), _no_stream, GAUSSIAN)
            self._clean_is_stale = False
        holders = self._holders[module]
        weight = holders.get("weight")
        if type(module).forward in _LINEAR and (weight is None or weight.name in self.factored):
            return self._correct_linear(
                original(*args, **kwargs), first_input(args, kwargs), weight, holders.get("bias")
            )
        if isinstance(module, nn.Embedding) and weight is not None and weight.name in self.factored:
            return self._correct_lookup(module, weight, original(*args, **kwargs), args, kwargs)

        def parameters(group: int) -> dict[str, Tensor]:
            return {name: self._moved_parameter(site, held(module, name), group) for name, site in holders.items()}

        return run_groups(module, parameters, max(1, len(self.probes)), self.rows_per_probe, args, kwargs)

    def _correct_linear(self, output: Tensor, x: Tensor, weight: Site | None, bias: Site | None) -> Tensor:
        """Adds (x · V) · Bᵀ + b to the output in one pass; a bias is one more column beside B.

        output: (..., m), written in place; x: (..., n)
        """
        groups, rows = max(1, len(self.probes)), output.numel() // output.shape[-1]
        require_equal_parts(x, groups)
        left: list[Tensor] = []  # (rows, r) and (rows, 1)
        right: list[Tensor] = []  # (groups, m, r) and (groups, m, 1)
        if weight is not None:
            left.append(x.reshape(rows, -1).to(output.dtype) @ self.basis(weight.name).to(output.dtype))
            right.append(self._materialised.at_point(weight.name))
        if bias is not None:
            left.append(output.new_ones(rows, 1))
            right.append(self._materialised.at_point(bias.name).unsqueeze(-1))
        thin = torch.cat(left, 1).view(groups, rows // groups, -1)
        factors = torch.cat(right, 2).to(output.dtype)
        output.view(groups, rows // groups, -1).baddbmm_(thin, factors.transpose(1, 2))
        return output

    def _correct_lookup(
        self, module: nn.Embedding, weight: Site, output: Tensor, args: Sequence, kwargs: Mapping
    ) -> Tensor:
        """Adds lookup(B) · Vᵀ. The module itself does the lookup, so that one which scales or shifts its ids is right.

        output: (..., n)
        """
        factors = self._materialised.at_point(weight.name)

        def parameters(group: int) -> dict[str, Tensor]:
            return {"weight": factors[group]}

        thin = run_groups(module, parameters, len(factors), self.rows_per_probe, args, kwargs)
        correction = thin.to(output.dtype) @ self.basis(weight.name).t().to(output.dtype)
        return output.add_(correction) if correction.shape == output.shape else output + correction

    def _moved_parameter(self, site: Site, parameter: Tensor | None, group: int) -> Tensor:
        """parameter: what the module holds now, which is whole even if `site.parameter` is a shard."""
        assert parameter is not None
        coordinate = self._materialised.at_point(site.name)[group]
        value = parameter.detach().to(coordinate.dtype)
        if site.name not in self.factored:
            return value + coordinate
        moved = torch.addmm(site.as_matrix(value), coordinate, self.basis(site.name).t().to(coordinate.dtype))
        return (moved.t() if site.transposed else moved).reshape(value.shape).to(parameter.dtype)

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        self._materialised.write_gradient(coefficients, stream_of, distribution)

    def _enter_point(self, stream_of: StreamOf, distribution: Distribution) -> None:
        self._materialised.set_point(self.probes, stream_of, distribution)

    def _leave_point(self) -> None:
        self._clean_is_stale = True

    def coordinates_changed(self) -> None:
        self._at_origin, self._clean_is_stale = False, True

    def fold(self, step: int, decay: Mapping[str, float]) -> None:
        reshard(self.model)
        with torch.no_grad():
            for site in self.sites:
                part, first = local_part(site.parameter)
                self._fold_into(part, first, site, step, decay.get(site.name, 1.0))
                self.coordinates[site.name].zero_()
        self.draw_bases(step)
        self._at_origin, self._clean_is_stale = True, True

    def folded_state_dict(self, step: int, decay: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        reshard(self.model)
        sites = {id(site.parameter): site for site in self.sites}
        folded: dict[int, Tensor] = {}
        state = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
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

    def set_origin(self) -> None:
        """Say that every coordinate is zero, so that the model's own weights are the current model."""
        self._at_origin = True

    def base_state(self) -> dict[str, Tensor]:
        """The weights as of the last fold, by site name; to be called by every process, see `gather`."""
        reshard(self.model)
        return {site.name: gather(local_part(site.parameter)[0], site.parameter) for site in self.sites}

    @property
    def at_origin(self) -> bool:
        """Whether every coordinate is zero, so that the model's own weights are the current model."""
        return self._at_origin

    @torch.no_grad()
    def _fold_into(self, target: Tensor, first: int, site: Site, step: int, decay: float) -> None:
        """target ← decay · target + the coordinates' part, a tile of rows at a time.

        target: the parameter, or a copy of it on any device, contiguous; or some of its first dimension's slices.
        first: index in the parameter of target's first element.
        """
        coordinate = self.coordinates[site.name].detach()
        if site.name in self.factored:
            left, right = coordinate, self.basis(site.name).to(coordinate.dtype)
            if site.transposed:
                left, right = right, left
            storage = site.as_matrix(target).t() if site.transposed else site.as_matrix(target)
        else:
            left, right = coordinate.reshape(-1, 1), coordinate.new_ones(1, 1)
            storage = target.view(-1, 1)
        left = left[first // storage.shape[1] :]
        stream = Stream(self.seed, step, purpose=Purpose.ROUNDING)
        rows_per_tile = max(1, TILE // storage.shape[1])
        for start in range(0, storage.shape[0], rows_per_tile):
            rows = storage[start : start + rows_per_tile]
            update = (left[start : start + len(rows)] @ right.t()).to(target.device)
            if target.dtype in HALF:
                element = first + start * storage.shape[1]
                uniform = draw_uniform(stream, site.name, element, element + rows.numel(), target.device)
                value = rows.float().mul_(decay).add_(update)
                rows.copy_(stochastic_round(value, target.dtype, uniform.view(rows.shape)))
            else:
                rows.mul_(decay).add_(update)


def _no_stream(direction: int) -> Stream:
    raise AssertionError("the current point needs no direction")
