"""Low-rank coordinates: a thin matrix for every weight matrix, and a vector for every parameter of one dimension.

After LOZO (Chen et al., arXiv 2410.07698), with the low-rank term inside the forward as in EGGROLL (arXiv 2511.16652):

    W(B) = W + B · Vᵀ / √r         B: (m, r), the coordinates, float32, zero after a fold
                                   V: (n, r), standard normal from the seed, kept for `fold_steps` steps; or made of
                                      the layer's inputs, see `activation_basis`
    probe:  y = x · Wᵀ + (x · V/√r) · (B ± εU)ᵀ       U: (m, r), the direction
    fold:   W ← W + B · Vᵀ / √r,   B ← 0,   V ← a new draw

An entry of U · Vᵀ / √r has unit variance, so ε and the learning rate mean the same as for a dense direction. A probe
costs two thin products beside x · Wᵀ and no pass over W, whatever format W is stored in.

Over a quantized model without folds, B and V become a LoRA adapter at the end, see `adapter_at_end`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.directions import GAUSSIAN, Distribution
from zo_hf.method_info import Method
from zo_hf.parallel.shards import local_part
from zo_hf.rng import NoiseLayout, Purpose, Stream, StreamOf, draw
from zo_hf.subspaces import code_rounding, fold_pieces
from zo_hf.subspaces.activation_basis import measure_bases
from zo_hf.subspaces.adapter_at_end import AdapterAtEnd
from zo_hf.subspaces.bases import Bases
from zo_hf.subspaces.blocks import CoordinateBlock
from zo_hf.subspaces.entries import forward_of
from zo_hf.subspaces.factors import Factors
from zo_hf.subspaces.folded import DEFAULT_FOLD_STEPS
from zo_hf.subspaces.functional import HALF, held
from zo_hf.subspaces.input_scales import measure_scales
from zo_hf.subspaces.layer_inputs import LINEAR, first_input, require_equal_parts
from zo_hf.subspaces.lookups import Lookups
from zo_hf.subspaces.moved_linear import moved_linear, plain_weights
from zo_hf.subspaces.moved_vectors import MovedVectors
from zo_hf.subspaces.per_group import functional_call_per_group, looked_up_per_group
from zo_hf.subspaces.sites import Pattern, Site, coordinate_dtype


class LowRank(AdapterAtEnd):
    """Low-rank factors as coordinates, as in the formula above.

    Args:
        model: the model with the parameters that move.
        rank: r; None means `default_rank`.
        fold_steps: number of steps between folds (ν); 0 never folds. None means 50, or 0 for a quantized model.
        target_modules: parameters that move, see `find_sites`.
        exclude_modules: parameters that do not move.
        among: if given, only these parameters may move, e.g. those of an optimizer.
        seed: seed of the run.
        basis: the source of V: "random", or "activation" for the inputs of linear layers, see `activation_basis`.
        preconditioner: "none", or "inputs" to divide directions by the size of inputs, see `input_scales`.
        fold_rounding: rounding of quantized weights: "stochastic" or "gptq", see `code_rounding`.

    Raises:
        ValueError: the model cannot give the inputs of its layers.
    """

    name = "low_rank"
    about = Method(
        "LOZO (2410.07698); AGZO (2601.17261); K-FAC (1503.05671)",
        memory="r(m + n) per matrix for B and V; d for the gradient",
    )
    default_rank = 4
    moves_quantized = True

    def __init__(
        self,
        model: nn.Module,
        rank: int | None = None,
        fold_steps: int | None = None,
        target_modules: Pattern = None,
        exclude_modules: Pattern = None,
        among: Iterable[Tensor] | None = None,
        seed: int = 0,
        basis: str = "random",
        preconditioner: str = "none",
        fold_rounding: str = "stochastic",
    ) -> None:
        self.basis_kind, self.preconditioner = basis, preconditioner
        self.rank = rank = self.default_rank if rank is None else rank
        super().__init__(model, fold_steps, target_modules, exclude_modules, among, seed)
        if fold_steps is None and not any(site.layer is not None for site in self.sites):
            self.fold_steps = DEFAULT_FOLD_STEPS  # no quantized layer moves
        code_rounding.check_rounding(fold_rounding, model, self.sites, self.fold_steps > 0)
        self.fold_rounding = fold_rounding
        self.factored: dict[str, Site] = {}
        for site in self.sites:
            p, shape = site.parameter, site.shape
            if len(shape) >= 2 and self._is_factored(site.matrix_shape):
                self.factored[site.name] = site
                shape = self._coordinate_shape(site.matrix_shape)
            elif site.layer is not None:
                raise ValueError(f"zo_rank={rank} is not below the width of {site.name}; choose a smaller rank.")
            zeros = torch.zeros(shape, dtype=coordinate_dtype(p), device=site.device)
            self.coordinates[site.name] = nn.Parameter(zeros)
        self._bases = Bases(rank, self._dtype_of_basis)
        self._lookups = Lookups()
        self._begin()
        self._factors = self._make_factors()
        self._vectors = {
            block: MovedVectors(block, [site for site in self.sites if site.name in block.coordinates])
            for block in self._coordinate_blocks
            if draw.is_launched(block.layout.device)
        }

    def _is_factored(self, shape: torch.Size) -> bool:
        return shape[1] > self.rank

    def _coordinate_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((shape[0], self.rank))

    def draw_bases(self, step: int) -> None:
        """Draw V / √r for every matrix, (n, r), keyed by the step from which it is used."""
        super().draw_bases(step)
        by_device: dict[torch.device, dict[str, torch.Size]] = {}
        for name, site in self.factored.items():
            shape = torch.Size((site.matrix_shape[1], self.rank))
            by_device.setdefault(site.device, {})[name] = shape
        stream = Stream(self.seed, step, purpose=Purpose.BASIS)
        for device, shapes in by_device.items():
            layout = NoiseLayout(shapes, device)
            flat = layout.draw(stream, GAUSSIAN).mul_(self.rank**-0.5)
            if self._has_factors(device):
                self._bases.take_all(layout, flat)
                continue
            for name, view in layout.views(flat).items():
                self._bases.take(name, view)
        if (self.basis_kind, self.preconditioner) != ("random", "none"):
            self._measure_inputs(stream)

    def _has_factors(self, device: torch.device) -> bool:
        """Return whether the factors of a device's layers are one tensor, see `factors`."""
        return draw.is_launched(device) and 128 % self.rank == 0

    def _make_factors(self) -> dict[CoordinateBlock, Factors]:
        blocks = [block for block in self._coordinate_blocks if self._has_factors(block.layout.device)]
        bias_of: dict[CoordinateBlock, dict[str, str]] = {block: {} for block in blocks}
        for module, holders in self._holders.items():
            weight, bias = holders.get("weight"), holders.get("bias")
            if weight is None or bias is None or weight.name not in self.factored or not self._is_linear(module):
                continue
            block = self._coordinate_blocks.of(weight.name)
            if block in bias_of and self._coordinate_blocks.of(bias.name) is block:
                bias_of[block].setdefault(weight.name, bias.name)
        return {block: Factors(block, self.rank, bias_of[block]) for block in blocks}

    def _dtype_of_basis(self, name: str) -> torch.dtype:
        # The forward multiplies by V in the weight's dtype, so the fold must add the V that is rounded to it.
        dtype = self._dtype_of(self.factored[name])
        return dtype if dtype in HALF else self.coordinates[name].dtype

    def _measure_inputs(self, stream: Stream) -> None:
        """Make V of the inputs of linear layers, or divide directions by them, at the weights without the coordinates."""
        layers = {
            name: [module for module, _ in site.uses if self._is_linear(module)]
            for name, site in self.factored.items()
        }
        before, self._at_origin = self._at_origin, True
        try:
            if self.basis_kind == "activation":
                for name, basis in measure_bases(self.model, layers, self.rank, stream).items():
                    self._bases.take(name, basis)
            if self.preconditioner == "inputs":
                norms = {
                    site.name: module
                    for site in self.sites
                    for module, attribute in site.uses
                    if len(site.shape) == 1 and attribute == "weight"
                }
                for name, scale in measure_scales(self.model, layers, norms, stream).items():
                    self._scale(name, scale)
        finally:
            self._at_origin = before

    def _scale(self, name: str, scale: Tensor) -> None:
        if name in self.factored:
            basis = self.basis(name)  # a tied weight may lie on another device than the inputs of the output layer
            self._bases.take(name, basis * scale.to(basis.device)[:, None])
        else:
            self._coordinate_blocks.of(name).set_scale(name, scale)

    def _enter_point(self, stream_of: StreamOf, distribution: Distribution) -> None:
        # What all layers read at the new point is not made in their forwards, so that a compiled one stays the same.
        super()._enter_point(stream_of, distribution)
        self._refresh_factors()
        for vectors in self._vectors.values():
            vectors.refresh()

    def _refresh_point(self) -> None:
        if not self.probes and self._clean_is_stale:
            super()._refresh_point()
            self._refresh_factors()

    def _refresh_factors(self) -> None:
        for factors in self._factors.values():
            factors.refresh()

    def _dtype_of(self, site: Site) -> torch.dtype:
        """Return the dtype in which a weight is multiplied."""
        if site.layer is None:
            return site.parameter.dtype
        dtypes = (p.dtype for p in self.model.parameters() if p.is_floating_point() and p.element_size() > 1)
        return next(dtypes, torch.float32)

    def read_at_point(self) -> list[Tensor]:
        return [*super().read_at_point(), *self._bases.tensors()]

    def basis(self, name: str) -> Tensor:
        """Return V / √r of one matrix, (n, r), in the dtype of the product; a fold writes the next one into it."""
        return self._bases[name]

    def _left(self, name: str) -> Tensor:
        """Return the factor to the left of Vᵀ, (m, r)."""
        return self.coordinates[name].detach()

    def _left_at_point(self, name: str) -> Tensor:
        """Return the factor to the left of Vᵀ at every probe, (probes, m, r)."""
        return self._coordinate_blocks.at_point(name)

    def forward(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        self._refresh_point()
        holders = self._holders[module]
        weight = holders.get("weight")
        if self._is_corrected(module):
            x, bias = first_input(args, kwargs), holders.get("bias")
            has_tangent = bool(self.probes) and self.probes[0].derivative
            plain = None if has_tangent or self.packing is not None else plain_weights(module, original, x)
            if plain is not None:
                return self._move_linear(*plain, x, weight, bias)
            return self._correct_linear(original(*args, **kwargs), x, weight, bias)
        if weight is not None and weight.name in self.factored and self._lookups.keep_products(module, args, kwargs):
            output = self._lookups.writable(module, original(*args, **kwargs))
            return self._correct_lookup(module, weight, output, args, kwargs)

        def parameters(group: int) -> dict[str, Tensor]:
            return {name: self._moved_parameter(site, held(module, name), group) for name, site in holders.items()}

        def stacked() -> dict[str, Tensor]:
            return {name: self._moved_vectors(site, held(module, name)) for name, site in holders.items()}

        are_vectors = all(len(site.shape) == 1 for site in holders.values())
        return functional_call_per_group(
            module,
            parameters,
            max(1, len(self.probes)),
            self.rows_per_probe,
            args,
            kwargs,
            stacked if are_vectors else None,
        )

    def forward_packed(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        is_corrected = self._is_corrected(module)  # which needs no padding
        return (self.forward if is_corrected else super().forward_packed)(module, original, args, kwargs)

    def _is_linear(self, module: nn.Module) -> bool:
        return forward_of(module) in LINEAR or module in self.quantized

    def _is_corrected(self, module: nn.Module) -> bool:
        weight = self._holders[module].get("weight")
        return self._is_linear(module) and (weight is None or weight.name in self.factored)

    def _move_linear(
        self, matrix: Tensor, vector: Tensor | None, x: Tensor, weight: Site | None, bias: Site | None
    ) -> Tensor:
        """Return the output of a plain layer, (..., m); matrix: (n, m); vector: (m,); x: (..., n)."""
        groups = max(1, len(self.probes))
        require_equal_parts(x, groups, self.rows_per_probe)
        rows = x.reshape(-1, x.shape[-1])
        if bias is not None and vector is not None:
            vector = vector + self._coordinate_blocks.at_point(bias.name)
        thin = left = None
        if weight is not None:
            thin, left = rows @ self.basis(weight.name), self._left_at_point(weight.name)
        return moved_linear(rows, matrix, vector, thin, left, groups).view(*x.shape[:-1], -1)

    def _correct_linear(self, output: Tensor, x: Tensor, weight: Site | None, bias: Site | None) -> Tensor:
        """Add (x · V) · Bᵀ + b to the output in one pass; a bias is one more column beside B.

        output: (..., m), written in place; x: (..., n)
        """
        if not output.numel():  # such as that of an expert that no token chose
            return output
        groups, rows = max(1, len(self.probes)), output.numel() // output.shape[-1]
        x_rows, merged = x.reshape(rows, -1).to(output.dtype), self._merged(weight, bias)
        if self.packing is None:
            require_equal_parts(x, groups, self.rows_per_probe)
            if merged is not None and weight is not None:
                basis = self._bases.wide(weight.name).to(output.dtype)
                if merged.add_product(output.view(rows, -1), x_rows, weight.name, basis, bias is not None):
                    return output
        thin, factors = self._thin_product(output, x_rows, weight, bias)
        factors = factors.transpose(1, 2)
        if self.packing is not None:
            output.view(rows, -1).addmm_(self.packing.in_blocks(thin, x), factors.flatten(0, 1))
            return output
        output.view(groups, rows // groups, -1).baddbmm_(thin.view(groups, rows // groups, -1), factors)
        return output

    def _thin_product(
        self, output: Tensor, x: Tensor, weight: Site | None, bias: Site | None
    ) -> tuple[Tensor, Tensor]:
        """Return x · V with a column of ones, (rows, width), and the factors that it is multiplied by, (groups, m, width).

        output: (..., m); x: (rows, n), in its dtype
        """
        merged = self._merged(weight, bias)
        if merged is not None and weight is not None:
            basis = self._bases.wide(weight.name).to(output.dtype)
            thin = x @ basis if bias is None else torch.addmm(merged.one(output.dtype), x, basis)
            return thin, merged.of(weight.name, output.dtype)
        left: list[Tensor] = []  # (rows, r) and (rows, 1)
        right: list[Tensor] = []  # (groups, m, r) and (groups, m, 1)
        if weight is not None:
            left.append(x @ self.basis(weight.name).to(output.dtype))
            right.append(self._left_at_point(weight.name))
        if bias is not None:
            left.append(output.new_ones(len(x), 1))
            right.append(self._coordinate_blocks.at_point(bias.name).unsqueeze(-1))
        return torch.cat(left, 1), torch.cat(right, 2).to(output.dtype)

    def _merged(self, weight: Site | None, bias: Site | None) -> Factors | None:
        """Return the factors that hold those of a layer; None if they do not, or must be differentiated."""
        if weight is None or self._is_differentiable:
            return None
        block = self._coordinate_blocks.of(weight.name)
        factors = self._factors.get(block)
        if factors is None or block.tangent is not None:
            return None
        return factors if bias is None or factors.bias_of.get(weight.name) == bias.name else None

    def _correct_lookup(
        self, module: nn.Module, weight: Site, output: Tensor, args: Sequence, kwargs: Mapping
    ) -> Tensor:
        """Add lookup(B) · Vᵀ to the output, (..., n).

        The module itself does the lookup, because some modules scale their output or shift their ids.
        """
        merged, dtype = self._merged(weight, None), output.dtype
        factors = self._left_at_point(weight.name) if merged is None else merged.of(weight.name, dtype)

        def parameters(group: int) -> dict[str, Tensor]:
            return {"weight": factors[group]}

        thin = looked_up_per_group(module, factors, self.rows_per_probe, args, kwargs)
        if thin is None:
            thin = functional_call_per_group(module, parameters, len(factors), self.rows_per_probe, args, kwargs)
        basis = self.basis(weight.name) if merged is None else self._bases.wide(weight.name)
        thin, right = thin.to(dtype), basis.t().to(dtype)
        if merged is not None and thin.shape[:-1] == output.shape[:-1]:
            output.view(-1, output.shape[-1]).addmm_(thin.flatten(0, -2), right)
            return output
        correction = thin @ right
        return output.add_(correction) if correction.shape == output.shape else output + correction

    def _moved_parameter(self, site: Site, parameter: Tensor | None, group: int) -> Tensor:
        """Return the parameter of a module at the point of a group.

        parameter: the module's present parameter, which is whole even if `site.parameter` is a shard.
        """
        assert parameter is not None
        moved = self._in_coordinates_dtype(site, parameter, group)
        return moved.to(parameter.dtype) if site.name in self.factored else moved

    def _moved_vectors(self, site: Site, parameter: Tensor | None) -> Tensor:
        """Return a parameter of one dimension at the points of all groups, (groups, d)."""
        assert parameter is not None
        together = self._moved_together(site)
        return self._coordinate_blocks.at_point(site.name) + parameter.detach() if together is None else together

    def _moved_together(self, site: Site) -> Tensor | None:
        """Return a parameter that has been moved with all others, (groups, d); None if it has not."""
        block = self._coordinate_blocks.of(site.name)
        vectors = self._vectors.get(block)
        if vectors is None or site.name not in vectors or block.tangent is not None or self._is_differentiable:
            return None
        # Only a probe keeps the weights from being written: a pass without probes reads them as they are now.
        return vectors.of(site.name) if self.probes else None

    def _in_coordinates_dtype(self, site: Site, parameter: Tensor, group: int) -> Tensor:
        together = self._moved_together(site)
        if together is not None:
            return together[group]
        if site.name not in self.factored:
            return parameter.detach() + self._coordinate_blocks.at_point(site.name)[group]
        value = parameter.detach().to(self.coordinates[site.name].dtype)
        left = self._left_at_point(site.name)[group]
        moved = torch.addmm(site.as_matrix(value), left, self.basis(site.name).t().to(left.dtype))
        return (moved.t() if site.transposed else moved).reshape(value.shape)

    def _value_at_point(self, site: Site, parameter: Tensor) -> Tensor:
        self._refresh_point()
        return self._in_coordinates_dtype(site, parameter, 0)

    @torch.no_grad()
    def _fold_plain(self, targets: Iterable[tuple[Site, Tensor]], step: int, decay: Mapping[str, float]) -> None:
        parts = ((*local_part(tensor), site) for site, tensor in targets)
        pieces = (self._piece(part, first, site, decay.get(site.name, 1.0)) for part, first, site in parts)
        fold_pieces.write(pieces, Stream(self.seed, step, purpose=Purpose.ROUNDING))

    @torch.no_grad()
    def _fold_into(self, target: Tensor, first: int, site: Site, step: int, decay: float) -> None:
        stream = Stream(self.seed, step, purpose=Purpose.ROUNDING)
        fold_pieces.write([self._piece(target, first, site, decay)], stream)

    def _piece(self, target: Tensor, first: int, site: Site, decay: float) -> fold_pieces.Piece:
        """Return what a fold makes of a parameter or of some slices of it; the arguments are those of `_fold_into`."""
        if site.name not in self.factored:
            left = self.coordinates[site.name].detach().flatten()[first:][: target.numel()]
            return fold_pieces.Piece(target.view(-1), left, None, site.name, first, decay)
        left = self._left(site.name)
        right = self.basis(site.name).to(left.dtype)
        if site.transposed:
            left, right = right, left
        storage = site.as_matrix(target).t() if site.transposed else site.as_matrix(target)
        left = left[first // storage.shape[1] :][: len(storage)]
        return fold_pieces.Piece(storage, left, right, site.name, first, decay)

    def _rows(self, site: Site, start: int, stop: int) -> Tensor:
        left = self._left(site.name)[start:stop]
        return left @ self.basis(site.name).t().to(left.dtype)
