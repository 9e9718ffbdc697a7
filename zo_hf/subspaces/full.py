"""All weights as coordinates, with a dense direction: MeZO (Malladi et al., arXiv 2305.17333), formula (1)-(2).

    probe:   W' = W ± ε · z        formed a tile at a time inside the forward of the module that holds W
    update:  W ← W - η · c · z     by `SeededSGD`, which draws z again
    derivative:  W with tangent z  for the module that holds W, which costs a copy of one module's weights at a time

Where `zo_hf.kernels` run, an update is one launch, and signs are drawn inside of the kernel that probes a linear layer.

Neither a gradient nor a direction is ever held. In half precision W ± ε · z would round away most of the perturbation.
The perturbation then is a product of its own, x · Wᵀ ± ε · x · zᵀ, and probe and update round z to the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from zo_hf import kernels
from zo_hf.directions import Distribution, Rademacher
from zo_hf.directions.distributions import DrawnByKernels
from zo_hf.estimators.probe import NotBatchable
from zo_hf.method_info import Method
from zo_hf.rng import Purpose, Stream, StreamOf
from zo_hf.rng.rounding import draw_uniform, stochastic_round
from zo_hf.rng.stream import tensor_key
from zo_hf.subspaces.entries import forward_of
from zo_hf.subspaces.functional import HALF
from zo_hf.subspaces.layer_inputs import first_input, require_equal_parts, require_ids_of_rows
from zo_hf.subspaces.per_group import functional_call_per_group
from zo_hf.subspaces.sites import Pattern, Site, require_contiguous
from zo_hf.subspaces.subspace import Subspace

# Elements of a weight perturbed or updated at a time, so that the noise of a large weight never exists as a whole.
# Measured on a CPU: smaller tiles spend time on calls, larger ones on cache misses.
TILE = 1 << 20


class Full(Subspace):
    """Moves every selected parameter itself, and never holds its gradient.

    Attributes:
        pending: pairs (stream, coefficient) that `SeededSGD` applies at its next step.
        distribution: distribution of the pending directions.
        site_of: site of each moving parameter, by the parameter's `id`.
    """

    name = "full"
    about = Method("MeZO (2305.17333)", needs="optim=sgd")

    def __init__(
        self,
        model: nn.Module,
        target_modules: Pattern = None,
        exclude_modules: Pattern = None,
        among: Iterable[Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, target_modules, exclude_modules, among, seed)
        require_contiguous(self.sites)
        self.coordinates = {site.name: site.parameter for site in self.sites}
        self.site_of = {id(site.parameter): site for site in self.sites}
        self.pending: list[tuple[Stream, float]] = []
        self.distribution: Distribution | None = None

    @property
    def takes_groups_cheaply(self) -> bool:
        return False  # every group draws all weights

    def moved(self, module: nn.Module) -> bool:
        if not self.probes:
            return False
        stream = self._stream_of(self.probes[0].direction)
        return any(self._distribution.moves(stream, site.name) for site in self._holders[module].values())

    # torch.compile fails on the noise's integer arithmetic. torch.compiler.disable does the same, but imports dynamo.
    @torch._disable_dynamo
    def forward(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        holders = self._holders[module]
        weight = None if self.probes[0].derivative else holders.get("weight")
        if weight is not None and isinstance(module, nn.Linear) and forward_of(module) is nn.Linear.forward:
            return self._linear(module, weight, holders.get("bias"), first_input(args, kwargs))
        if weight is not None and forward_of(module) is nn.Embedding.forward:
            ids = first_input(args, kwargs)
            return self._lookup(weight, original(*args, **kwargs), ids)

        def parameters(group: int) -> dict[str, Tensor]:
            return {attribute: self._perturbed(site, group) for attribute, site in holders.items()}

        return functional_call_per_group(module, parameters, len(self.probes), self.rows_per_probe, args, kwargs)

    def _linear(self, module: nn.Linear, weight: Site, bias: Site | None, x: Tensor) -> Tensor:
        """Compute the output a tile of output features at a time. x: (..., n) -> (..., m)"""
        features_out, features_in = weight.parameter.shape
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        groups = len(self.probes)
        rows = x.numel() // features_in
        require_equal_parts(x, groups, self.rows_per_probe)
        parts = x.reshape(groups, rows // groups, features_in).to(dtype)
        if (
            isinstance(self._distribution, Rademacher)
            and self._distribution.has_kernels
            and features_in % 32 == 0
            and _has_kernel(parts, weight.parameter)
        ):
            return self._linear_in_kernel(module, weight, bias, parts).view(*x.shape[:-1], features_out)
        output = parts.new_empty(groups, rows // groups, features_out)
        tile = max(1, TILE // features_in)
        for start in range(0, features_out, tile):
            stop = min(start + tile, features_out)
            base = weight.parameter.detach()[start:stop]
            noise, drawn = base, None
            for group, probe in enumerate(self.probes):
                out = output[group, :, start:stop]
                if probe.scale == 0.0:  # the same product as for other probes, for the same rounding
                    torch.mm(parts[group], base.to(dtype).t(), out=out)
                    continue
                if probe.direction != drawn:
                    noise = base  # the last direction's noise goes before the next is drawn
                    noise = self._noise(weight, probe.direction, start * features_in, stop * features_in)
                    noise, drawn = noise.view(base.shape), probe.direction
                if dtype in HALF:
                    torch.mm(parts[group], base.to(dtype).t(), out=out)
                    out.addmm_(parts[group], noise.to(dtype).t(), alpha=probe.scale)
                else:
                    torch.mm(parts[group], torch.add(base, noise, alpha=probe.scale).t(), out=out)
        if bias is not None:
            output += torch.stack([self._perturbed(bias, group) for group in range(groups)])[:, None].to(dtype)
        elif module.bias is not None:
            output += module.bias.to(dtype)
        return output.view(*x.shape[:-1], features_out)

    def _linear_in_kernel(self, module: nn.Linear, weight: Site, bias: Site | None, x: Tensor) -> Tensor:
        """Compute the same for signs, of which no tensor is made. x: (probes, rows, n) -> (probes, rows, m)"""
        from zo_hf.kernels.perturbed_linear import perturbed_linear

        offset = module.bias if bias is None else bias.parameter
        return perturbed_linear(
            x.contiguous(),
            weight.parameter.detach(),
            None if offset is None else offset.detach(),
            (tensor_key(weight.name), None if bias is None else tensor_key(bias.name)),
            [self._stream_of(probe.direction).key for probe in self.probes],
            [probe.scale for probe in self.probes],
        )

    def _lookup(self, weight: Site, output: Tensor, ids: Tensor) -> Tensor:
        """Add scale · z[ids] to the output, (..., n), for each group of the batch; ids: (...)."""
        groups = len(self.probes)
        if ids.ndim == 0:
            if groups > 1:
                raise NotBatchable("an embedding looks up a single id, which probes cannot share")
            return self._lookup(weight, output[None], ids[None])[0]
        if ids.shape[0] == 1 and groups > 1:
            output = output.expand(groups * self.rows_per_probe, *output.shape[1:]).clone()
            ids = ids.expand(groups * self.rows_per_probe, *ids.shape[1:])
        if groups > 1:
            require_ids_of_rows(ids, groups, self.rows_per_probe)
        for probe, part, part_ids in zip(self.probes, output.chunk(groups), ids.chunk(groups), strict=True):
            if probe.scale == 0.0:
                continue
            rows, inverse = part_ids.unique(return_inverse=True)
            stream = self._stream_of(probe.direction)
            noise = self._distribution.draw_rows(stream, weight.name, rows, weight.parameter.detach())
            part.add_(noise[inverse].to(part.dtype), alpha=probe.scale)
        return output

    def _perturbed(self, site: Site, group: int) -> Tensor:
        probe, value = self.probes[group], site.parameter.detach()
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        if probe.scale == 0.0 and not probe.derivative:
            return value.to(dtype)
        noise = self._noise(site, probe.direction, 0, value.numel()).view(value.shape)
        if probe.derivative:  # in the weight's dtype, for a tangent is not added to the weight and does not round away
            return forward_ad.make_dual(value, noise.to(value.dtype))
        return torch.add(value.to(dtype), noise.to(dtype), alpha=probe.scale)

    def _value_at_point(self, site: Site, parameter: Tensor) -> Tensor:
        return self._perturbed(site, 0)

    def _noise(self, site: Site, direction: int, start: int, stop: int) -> Tensor:
        values = site.parameter.detach().view(-1)[start:stop]
        return draw_in_weight_dtype(self._stream_of(direction), site.name, start, values, self._distribution)

    def _enter_point(self, stream_of: StreamOf, distribution: Distribution) -> None:
        self._stream_of, self._distribution = stream_of, distribution

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        self.distribution = distribution
        self.pending = [(stream_of(index), coefficient) for index, coefficient in enumerate(coefficients)]

    def clear_gradient(self) -> None:
        self.pending = []

    def gradient_norm(self) -> Tensor:
        """Return the expected norm of the pending update, √d · √Σ cᵢ², with d the number of weights that move.

        It is exact for one Rademacher direction. The actual norm would take a pass over all weights.
        """
        if not self.pending:
            return torch.tensor(0.0, dtype=torch.float64)
        assert self.distribution is not None
        still = sum(self.coordinates[name].numel() for name in self.still)
        moving = self.distribution.moving(self.pending[0][0], self.dimension - still)
        return torch.tensor(moving**0.5 * sum(c * c for _, c in self.pending) ** 0.5, dtype=torch.float64)

    def scale_gradient(self, factor: float) -> None:
        self.pending = [(stream, c * factor) for stream, c in self.pending]

    @torch.no_grad()
    def apply_pending(self, parameter: nn.Parameter, learning_rate: float, decay: float) -> None:
        """Set parameter to decay · parameter - learning_rate · Σ c · z, in one pass, a tile at a time.

        A parameter that no z of this step moves stays as it is, without decay.
        """
        assert self.distribution is not None
        site = self.site_of[id(parameter)]
        if site.name in self.still or not self.distribution.moves(self.pending[0][0], site.name):
            return
        flat = parameter.data.view(-1)
        if isinstance(self.distribution, DrawnByKernels) and self.distribution.has_kernels and _has_kernel(flat):
            self._apply_in_kernel(flat, site.name, learning_rate, decay, self.distribution)
            return
        for start in range(0, len(flat), TILE):
            stop = min(start + TILE, len(flat))
            before = value = flat[start:stop]
            if flat.dtype in HALF:
                value = value.float()
            elif self.distribution.reads_weights:
                before = value.clone()  # every direction depends on the weights as they were probed
            if decay != 1.0:
                value.mul_(decay)
            for stream, coefficient in self.pending:
                noise = draw_in_weight_dtype(stream, site.name, start, before, self.distribution)
                value.add_(noise, alpha=-learning_rate * coefficient)
            if flat.dtype in HALF:
                uniform = draw_uniform(self._rounding, site.name, start, stop, flat.device)
                flat[start:stop] = stochastic_round(value, flat.dtype, uniform)

    def _apply_in_kernel(
        self, flat: Tensor, name: str, learning_rate: float, decay: float, distribution: DrawnByKernels
    ) -> None:
        """Do the same to all elements of a parameter, (d,), in one launch."""
        from zo_hf.kernels.seeded_update import seeded_update

        seeded_update(
            flat,
            tensor_key(name),
            [stream.key for stream, _ in self.pending],
            [-learning_rate * coefficient for _, coefficient in self.pending],
            decay,
            self._rounding.key,
            distribution.table(flat.device, flat.dtype),
        )

    @property
    def _rounding(self) -> Stream:
        return Stream(self.seed, self.pending[0][0].step, purpose=Purpose.ROUNDING)


def _has_kernel(*tensors: Tensor) -> bool:
    return all(kernels.run_on(tensor.device) and tensor.dtype in (torch.float32, *HALF) for tensor in tensors)


def draw_in_weight_dtype(stream: Stream, name: str, start: int, values: Tensor, distribution: Distribution) -> Tensor:
    """Draw z over a slice of a weight and round it to the weight's dtype; half precision comes back as float32.

    Args:
        stream: stream of the direction.
        name: name of the weight.
        start: index of the slice's first element in the flattened weight.
        values: the slice, (n,), as it was at the beginning of the step.
        distribution: distribution of the direction.

    Returns:
        (n,), float32 or float64.
    """
    noise = distribution.draw_slice(stream, name, start, values).to(values.dtype)
    return noise.float() if values.dtype in HALF else noise
