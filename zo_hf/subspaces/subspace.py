"""The common part of all subspaces: entering the forward of the modules that hold moving parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from zo_hf.directions import GAUSSIAN, DirectionContext, Distribution, layers_of
from zo_hf.directions.options import DirectionOptions
from zo_hf.estimators.probe import Probe
from zo_hf.method_info import Method
from zo_hf.offload import BlockLoader, is_offloaded
from zo_hf.quantization import quantized_layers
from zo_hf.rng import Purpose, Stream, StreamOf
from zo_hf.rng.rounding import round_in_tiles
from zo_hf.subspaces import position_bias
from zo_hf.subspaces.blocks import CoordinateBlocks
from zo_hf.subspaces.entries import enter, leave
from zo_hf.subspaces.functional import HALF, reads_all_parameters
from zo_hf.subspaces.packing import Packing
from zo_hf.subspaces.per_group import compare_ahead
from zo_hf.subspaces.reads import ReadWatch, must_read
from zo_hf.subspaces.row_lengths import RowLengths
from zo_hf.subspaces.sites import Pattern, Site, find_sites, is_decayed


class Subspace:
    """Coordinates ξ and the way in which they enter a model, θ(ξ).

    A subclass defines the coordinates and computes the output of a module at the current probes. Probing writes no
    weight: `attach` puts a function in front of each module's forward, and `detach` removes it.

    Args:
        model: the model with the parameters that move.
        target_modules: parameters that move, see `find_sites`.
        exclude_modules: parameters that do not move.
        among: if given, only these parameters may move, e.g. those of an optimizer.
        seed: seed of the run.

    Attributes:
        sites: sites of the parameters that move.
        coordinates: the coordinate tensors, by the names of their sites.
        probes: probes of the current forward pass; empty outside of `at`.
        clip_factor: product of the factors by which the estimate of this step has been clipped.
        reads: the parameters that probes have read, and where.
        joined_lengths: lengths that rows whose tokens the model joins may have, see `RowLengths`.
        compares_rows: True during the comparison of a run's first batch.
        still: names of sites that do not move, because no probe has read their parameters yet. `SettledReads` fills it.
    """

    #: Name in options.
    name: str
    #: Other names of it, such as the paper's.
    aliases: ClassVar[tuple[str, ...]] = ()
    about: ClassVar[Method]
    #: Default ε and learning rate, from MeZO for weights. Those of an adapter depend on its method.
    default_eps = 1e-3
    default_learning_rate = 1e-5
    # True only inside of `differentiable`.
    _is_differentiable = False
    #: Default bound on |c|; 0 does not clip.
    default_max_projected_grad = 0.0
    #: True if the coordinates stand for weights, which weight decay shrinks.
    are_weights = True
    #: True if the weights of quantized layers may move.
    moves_quantized = False
    #: True if weights that are kept off the device may move.
    moves_offloaded = False
    #: Loads the blocks of a model with offloaded weights; None for other models.
    loader: BlockLoader | None = None
    #: The groups of sequences packed into the present batch, if they are not rows.
    packing: Packing | None = None
    _with_bias: Sequence[nn.Module] = ()  # the layers that `attach` has given biases of every group
    _lengths: RowLengths | None = None  # of the present forward pass, if groups of rows share it
    _look: RemovableHandle | None = None  # the hook that sees the model's inputs

    def __init__(
        self,
        model: nn.Module,
        target_modules: Pattern = None,
        exclude_modules: Pattern = None,
        among: Iterable[Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.seed = seed
        self.target_modules, self.exclude_modules = target_modules, exclude_modules
        self.quantized = quantized_layers(model)
        if is_offloaded(model):
            self.loader = BlockLoader(model)
        self.sites = self._find_sites(among)
        offloaded = next((site.name for site in self.sites if site.offloaded is not None), None)
        if offloaded is not None and not self.moves_offloaded:
            raise ValueError(
                f"zo_subspace={self.name!r} would write {offloaded} in every step, and it is offloaded; use "
                "zo_subspace='low_rank', which writes weights only at a fold."
            )
        self.coordinates: dict[str, nn.Parameter] = {}
        self.probes: Sequence[Probe] = ()
        self.rows_per_probe = 0
        self.clip_factor = 1.0
        self.joined_lengths: set[int] = set()
        self.compares_rows = False
        self.still: set[str] = set()
        self._holders: dict[nn.Module, dict[str, Site]] = {}
        for site in self.sites:
            for module, attribute in site.uses:
                if not must_read(module, attribute, site):
                    self._holders.setdefault(module, {})[attribute] = site
        self.reads = ReadWatch(self)

    def _find_sites(self, among: Iterable[Tensor] | None) -> list[Site]:
        """Find the tensors that move; a subclass may leave out those that it cannot move."""
        movable = {}
        if self.moves_quantized:
            names = {module: name for name, module in self.model.named_modules()}
            # A layer that PEFT has wrapped stays as it is, quantized or not.
            movable = {m: layer for m, layer in self.quantized.items() if not names[m].endswith("base_layer")}
        return find_sites(self.model, self.target_modules, self.exclude_modules, among, movable)

    @property
    def dimension(self) -> int:
        """Number of coordinates."""
        return sum(coordinate.numel() for coordinate in self.coordinates.values())

    @property
    def device(self) -> torch.device:
        """Device of the coordinates; of the first ones, if they are on several."""
        return next(iter(self.coordinates.values())).device

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer: one with weight decay, and one without it (norms and biases)."""
        decayed = {site.name for site in self.sites if self.are_weights and is_decayed(site)}
        groups = []
        for names, decay in ((decayed, weight_decay), (self.coordinates.keys() - decayed, 0.0)):
            params = [p for name, p in self.coordinates.items() if name in names]
            if params:
                groups.append({"params": params, "weight_decay": decay})
        return groups

    def direction_context(self, num_directions: int = 1, options: DirectionOptions | None = None) -> DirectionContext:
        """Return the facts about this subspace that a distribution may need."""
        are_weights = all(self.coordinates[site.name] is site.parameter for site in self.sites)
        layers = layers_of(self.model, self.coordinates)
        options = DirectionOptions() if options is None else options
        return DirectionContext(self.coordinates, layers, num_directions, are_weights, options)

    def attach(self) -> None:
        """Wrap the forward of each module that has a moving parameter, and of each that rounds its input."""
        for module in self._entered():
            enter(module, _entered_forward, self)
        for module, sites in self._holders.items():
            compare_ahead(module, {name: self.coordinates[site.name] for name, site in sites.items()})
        self._with_bias = position_bias.layers_with_bias(self.model, self._holders)
        position_bias.enter(self._with_bias, self)
        self._look = self.model.register_forward_pre_hook(self._see_inputs, with_kwargs=True)
        self.reads.begin()
        if self.loader is not None:
            self.loader.attach()  # outermost, so that a module holds its weights when the subspace enters its forward

    def detach(self) -> None:
        """Restore every forward to its state before `attach`."""
        if self.loader is not None:
            self.loader.detach()
        self.reads.end()
        if self._look is not None:
            self._look.remove()
        position_bias.leave(self._with_bias)
        for module in self._entered():
            leave(module)

    def _see_inputs(self, _: nn.Module, args: Sequence, kwargs: Mapping) -> None:
        if not torch.compiler.is_compiling() and self._lengths is not None:  # compiled code shall not depend on it
            self._lengths.see((*args, *kwargs.values()))

    def _entered(self) -> list[nn.Module]:
        rough = [m for m, layer in self.quantized.items() if layer.rounds_activations and m not in self._holders]
        return [*self._holders, *rough]

    @contextmanager
    def at(
        self,
        probes: Sequence[Probe],
        stream_of: StreamOf,
        distribution: Distribution,
        rows: int = 0,
        packing: Packing | None = None,
    ) -> Iterator[None]:
        """Evaluate the model at ξ + scale · z inside this context; for a derivative, with tangent z.

        Args:
            probes: one probe, or several that share a forward pass. The batch then has a group of rows for each, in
                order. Either all of them ask for a derivative or none.
            stream_of: maps a direction's index to its stream.
            distribution: distribution of the directions.
            rows: number of rows of the batch in each group, if several probes share it.
            packing: the groups of sequences packed into the batch, if they are not rows.
        """
        self.probes, self.rows_per_probe, self.packing = probes, rows, packing
        if len(probes) > 1 and rows and packing is None:
            self._lengths = RowLengths(len(probes) * rows, self.joined_lengths, self.compares_rows)
        tangents = forward_ad.dual_level() if any(probe.derivative for probe in probes) else nullcontext()
        try:
            self._enter_point(stream_of, distribution)
            with tangents, self.reads.finding_held():
                yield
        finally:
            self.probes, self.rows_per_probe, self.packing, self._lengths = (), 0, None, None
            self._leave_point()

    @contextmanager
    def differentiable(self) -> Iterator[list[Tensor]]:
        """Make autograd differentiate the model inside this context.

        Yields:
            The tensors to differentiate with respect to: one for each coordinate tensor, of its shape and in order.
        """
        if self.coordinate_blocks is None:
            yield list(self.coordinates.values())
            return
        leaves = {name: p.detach().clone().requires_grad_() for name, p in self.coordinates.items()}
        self._is_differentiable = True
        try:
            with self.at((Probe(0, 0.0),), no_stream, GAUSSIAN), torch.enable_grad():
                for block in self.coordinate_blocks:
                    block.point = block.layout.join(leaves)[None].to(block.dtype)
                yield list(leaves.values())
        finally:
            self._is_differentiable = False
            for block in self.coordinate_blocks:
                block.point = None

    def hold_still(self) -> None:
        """Discard the estimate for the parameters that do not move."""
        for name in self.still:
            self.coordinates[name].grad = None

    # Subclasses override the following.

    @property
    def coordinate_blocks(self) -> CoordinateBlocks | None:
        """The coordinates as tensors with a gradient, or None if the subspace holds neither gradient nor direction."""
        return None

    def stay_in_place(self) -> None:
        """Keep what forward passes at probes read where it is, for CUDA graphs, which read addresses."""
        for block in self.coordinate_blocks or ():
            block.kept.stay = True

    def read_at_point(self) -> list[Tensor]:
        """Return the tensors beside the model's own that a forward pass at the current probes reads."""
        blocks, points = self.coordinate_blocks or (), max(1, len(self.probes))
        return [tensor for block in blocks for tensor in block.kept.holding(points)]

    @property
    def takes_groups_cheaply(self) -> bool:
        """True if a forward pass with parameters of their own for many groups of rows costs about one without."""
        return True

    @property
    def is_moved(self) -> bool:
        """True if the current point differs from the model's own parameters."""
        return bool(self.probes)

    def parameter_at_point(self, site: Site, module: nn.Module, parameter: Tensor) -> Tensor:
        """Compute a parameter at the current point, for a read outside of its module's forward.

        Args:
            site: site of the parameter, which is not quantized.
            module: module that holds the parameter.
            parameter: the module's current parameter, which is whole even if `site.parameter` is a shard.

        Returns:
            A tensor with the shape and the dtype of the parameter; half precision is rounded stochastically.
        """
        with nullcontext() if self._is_differentiable else torch.no_grad():
            value = self._value_at_point(site, parameter) if self.is_moved else parameter.detach()
            return self._rounded(site, value, self._read_dtype(module, parameter))

    def _read_dtype(self, module: nn.Module, parameter: Tensor) -> torch.dtype:
        """Return the dtype in which the code around a module expects its parameter."""
        return parameter.dtype

    def _rounded(self, site: Site, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Cast a parameter to the dtype in which it is read.

        All probes round with the same random bits. Rounding to nearest would lose most perturbations of large weights.
        """
        if value.dtype == dtype or dtype not in HALF or value.dtype != torch.float32:
            return value.to(dtype)
        if self._is_differentiable or any(probe.derivative for probe in self.probes):
            return value.to(dtype)
        return round_in_tiles(value, dtype, Stream(self.seed, purpose=Purpose.ROUNDING), site.name)

    def _value_at_point(self, site: Site, parameter: Tensor) -> Tensor:
        """Return a parameter at the current point, in its own dtype or in the coordinates'."""
        raise NotImplementedError

    def moved(self, module: nn.Module) -> bool:
        """Return True if the module's output at the current point differs from that of its own parameters."""
        raise NotImplementedError

    def forward(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        """Compute the module's output at the current point.

        Args:
            module: the module.
            original: forward of the module with its own parameters.
            args: positional inputs.
            kwargs: inputs by keyword.
        """
        raise NotImplementedError

    def forward_packed(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        """Compute the same for sequences packed into the rows of the batch, see `packing`."""
        assert self.packing is not None
        return self.packing.call(functools.partial(self.forward, module), original, args, kwargs)

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        """Hand the estimate Σᵢ coefficients[i] · zᵢ to the optimizer."""
        raise NotImplementedError

    def clear_gradient(self) -> None:
        """Discard the estimate, so that the optimizer has nothing to apply."""
        for coordinate in self.coordinates.values():
            coordinate.grad = None

    def gradient_norm(self) -> Tensor:
        """Return the 2-norm of the estimate over all coordinates, (), for which the host waits only if it is read."""
        gradients = [p.grad for p in self.coordinates.values() if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def scale_gradient(self, factor: float) -> None:
        """Multiply the estimate by `factor`."""
        gradients = [p.grad for p in self.coordinates.values() if p.grad is not None]
        if gradients and factor != 1.0:
            torch._foreach_mul_(gradients, factor)

    def clip_gradient(self, max_norm: float) -> float:
        """Scale the estimate to a norm of at most `max_norm`, and multiply `clip_factor` by the factor used.

        A norm may depend on the number of threads. The factor is therefore a plain number that the log records, and a
        replay multiplies by the recorded factor.

        Returns:
            The norm before clipping.
        """
        norm = float(self.gradient_norm())
        factor = min(1.0, max_norm / (norm + 1e-6))
        self.scale_gradient(factor)
        self.clip_factor *= factor
        return norm

    def coordinates_changed(self) -> None:
        """Take note of new coordinates; the caller invokes it after an optimizer step or a load."""

    def fold(self, step: int, decay: Mapping[str, float]) -> None:
        """Add the coordinates to the weights and set them to zero, if they are separate from the weights.

        Args:
            step: step after which the fold takes place, which keys the random draws.
            decay: factor by which each weight shrinks before, by name; 1 if it is missing.
        """

    def check_end(self) -> None:
        """Refuse to start a run that `finish` would refuse to end.

        Raises:
            ValueError: it is one; the message says what to use instead.
        """

    def finish(self, step: int, decay: Mapping[str, float]) -> nn.Module:
        """Detach from the model, and return the trained model: the model itself, or the model with an adapter."""
        self.fold(step, decay)
        self.clear_gradient()
        self.detach()
        return self.model

    def folded_state_dict(self, step: int, decay: Mapping[str, float] | None = None) -> dict[str, Tensor] | None:
        """Return the state dict that the model would have after `fold`, or None if it has it already."""
        return None

    def _enter_point(self, stream_of: StreamOf, distribution: Distribution) -> None:
        """Prepare the tensors that `forward` needs for `self.probes`."""

    def _leave_point(self) -> None:
        """Drop the tensors that `_enter_point` prepared."""


def no_stream(direction: int) -> Stream:
    """Stand in for a map of streams when only the current point is evaluated, which has no direction."""
    raise AssertionError("the current point needs no direction")


def _entered_forward(
    subspace: Subspace, module: nn.Module, previous: Callable | None, *args: Any, **kwargs: Any
) -> Any:
    original = previous if previous is not None else functools.partial(type(module).forward, module)
    layer = subspace.quantized.get(module)
    if layer is not None and layer.rounds_activations and subspace.probes:
        original = layer.forward
    if torch.compiler.is_compiling():
        subspace.reads.is_compiled = True
    holders = subspace._holders.get(module)
    if holders is None:
        return original(*args, **kwargs)
    if subspace.probes and (layer is not None or reads_all_parameters(module)):
        for site in holders.values():
            subspace.reads.note(site.name)
    with subspace.reads.inside(module):
        if not subspace.moved(module):
            return original(*args, **kwargs)
        if not torch.compiler.is_compiling() and subspace._lengths is not None:
            subspace._lengths.require_rows((*args, *kwargs.values()))
        with nullcontext() if subspace._is_differentiable else torch.no_grad():
            forward = subspace.forward if subspace.packing is None else subspace.forward_packed
            return forward(module, original, args, kwargs)
