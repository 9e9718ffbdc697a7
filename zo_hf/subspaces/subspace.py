"""The common part of every subspace: entering the forward of the modules that hold the moving parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from zo_hf.directions import GAUSSIAN, Distribution, Stream
from zo_hf.method import Method
from zo_hf.probes.probe import NotBatchable, Probe
from zo_hf.quantization import quantized_layers
from zo_hf.subspaces.shadow import Entry
from zo_hf.subspaces.sites import Pattern, Site, find_sites

if TYPE_CHECKING:
    from zo_hf.subspaces.materialised import Materialised

StreamOf = Callable[[int], Stream]


class Subspace:
    """How coordinates ξ enter a model: θ(ξ).

    A subclass says what its coordinates are and computes a module's output at the current probes. Nothing here writes a
    weight; `attach` puts a function in front of each module's forward and `detach` takes it away again.

    Args:
        model: the model whose parameters move.
        target_modules: which parameters move, see `find_sites`.
        exclude_modules: which do not.
        among: only these parameters may move, e.g. those an optimizer was built for.
        seed: the run's seed.
    """

    #: The name used in options.
    name: str
    about: ClassVar[Method]
    #: ε and what it multiplies are MeZO's: 1e-3 for weights; an adapter's depend on its method.
    default_eps = 1e-3
    default_learning_rate = 1e-5
    # Inside of `differentiable` alone.
    _is_differentiable = False
    #: Largest magnitude of c; 0 does not clip.
    default_max_projected_grad = 0.0
    #: Whether coordinates stand for weights, which weight decay shrinks.
    are_weights = True
    #: Whether the weights of quantised layers are among what moves.
    moves_quantized = False

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
        self.sites = self._find_sites(among)
        self.coordinates: dict[str, nn.Parameter] = {}
        self.probes: Sequence[Probe] = ()
        self.rows_per_probe = 0
        self.clip_factor = 1.0  # what the estimate of this step was multiplied by
        self.visited: set[nn.Module] = set()
        self._holders: dict[nn.Module, dict[str, Site]] = {}
        for site in self.sites:
            for module, attribute in site.uses:
                self._holders.setdefault(module, {})[attribute] = site

    def _find_sites(self, among: Iterable[Tensor] | None) -> list[Site]:
        """Which tensors move; a subclass may leave out what it cannot."""
        movable = {}
        if self.moves_quantized:
            names = {module: name for name, module in self.model.named_modules()}
            # What PEFT has wrapped stays as it is, quantised or not.
            movable = {m: layer for m, layer in self.quantized.items() if not names[m].endswith("base_layer")}
        return find_sites(self.model, self.target_modules, self.exclude_modules, among, movable)

    @property
    def dimension(self) -> int:
        """Number of coordinates."""
        return sum(coordinate.numel() for coordinate in self.coordinates.values())

    def attach(self) -> None:
        """Enter the forward of every module that holds a moving parameter, or whose own forward is too rough to probe."""
        for module in self._entered():
            # accelerate's hook moves the inputs to a dispatched module's device, then calls what it keeps here.
            key = "_old_forward" if "_hf_hook" in module.__dict__ else "forward"
            previous = module.__dict__.get(key)
            # A partial, not a closure: a deep copy of the model then gets entries that belong to the copy.
            module.__dict__[key] = Entry(_entered_forward, self, module, previous)

    def detach(self) -> None:
        """Leave every forward as it was before `attach`."""
        for module in self._entered():
            for key in ("_old_forward", "forward"):
                entry = module.__dict__.get(key)
                if isinstance(entry, Entry):
                    if entry.args[2] is None:
                        del module.__dict__[key]
                    else:
                        module.__dict__[key] = entry.args[2]

    def _entered(self) -> list[nn.Module]:
        rough = [m for m, layer in self.quantized.items() if layer.rounds_activations and m not in self._holders]
        return [*self._holders, *rough]

    @contextmanager
    def at(
        self, probes: Sequence[Probe], stream_of: StreamOf, distribution: Distribution, rows: int = 0
    ) -> Iterator[None]:
        """Evaluate the model at ξ + scale · z inside this context; for a derivative, with z as the tangent there.

        Args:
            probes: one, or several that share a forward pass: the batch then holds a group of rows for each, in order.
            stream_of: the stream of each direction index.
            distribution: what the directions are drawn from.
            rows: rows of the batch in each group, where there are several.
        """
        self.probes, self.rows_per_probe = probes, rows
        tangents = forward_ad.dual_level() if any(probe.derivative for probe in probes) else nullcontext()
        try:
            self._enter_point(stream_of, distribution)
            with tangents:
                yield
        finally:
            self.probes, self.rows_per_probe = (), 0
            self._leave_point()

    @contextmanager
    def differentiable(self) -> Iterator[list[Tensor]]:
        """Inside, autograd differentiates the model with respect to the tensors handed out: the coordinates, in order."""
        if self.materialised is None:
            yield list(self.coordinates.values())
            return
        leaves = {name: p.detach().clone().requires_grad_() for name, p in self.coordinates.items()}
        self._is_differentiable = True
        try:
            with self.at((Probe(0, 0.0),), no_stream, GAUSSIAN), torch.enable_grad():
                for block in self.materialised.blocks:
                    block.point = block.layout.join(leaves)[None].to(block.dtype)
                yield list(leaves.values())
        finally:
            self._is_differentiable = False
            for block in self.materialised.blocks:
                block.point = None

    def unvisited(self) -> list[str]:
        """Names of moving parameters whose module has not been called since `attach`."""
        return [site.name for site in self.sites if not any(module in self.visited for module, _ in site.uses)]

    # What a subclass provides.

    @property
    def materialised(self) -> Materialised | None:
        """The coordinates as tensors with a gradient, or None where neither that nor a direction is ever held."""
        return None

    def moved(self, module: nn.Module) -> bool:
        """Whether the module's output differs, at this moment, from that of its own parameters."""
        raise NotImplementedError

    def forward(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        """The module's output at the current point."""
        raise NotImplementedError

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        """Hand the estimate Σᵢ coefficients[i] · zᵢ to the optimizer."""
        raise NotImplementedError

    def clear_gradient(self) -> None:
        """Leave the optimizer nothing to apply."""
        for coordinate in self.coordinates.values():
            coordinate.grad = None

    def gradient_norm(self) -> float:
        """2-norm of the estimate over all coordinates."""
        gradients = [p.grad for p in self.coordinates.values() if p.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def scale_gradient(self, factor: float) -> None:
        """Multiply the estimate by `factor`."""
        gradients = [p.grad for p in self.coordinates.values() if p.grad is not None]
        if gradients and factor != 1.0:
            torch._foreach_mul_(gradients, factor)

    def clip_gradient(self, max_norm: float) -> float:
        """Scale the estimate to at most `max_norm`; returns the norm before and adds the factor to `clip_factor`.

        The factor is a number of its own, not a tensor's: a norm may depend on the number of threads, and a replay, which
        multiplies by the recorded factor, must not.
        """
        norm = self.gradient_norm()
        factor = min(1.0, max_norm / (norm + 1e-6))
        self.scale_gradient(factor)
        self.clip_factor *= factor
        return norm

    def coordinates_changed(self) -> None:
        """To be called after an optimizer step or a load."""

    def fold(self, step: int, decay: Mapping[str, float]) -> None:
        """Write the coordinates into the weights, where they are apart from them, and start again from zero.

        Args:
            step: the step after which the fold takes place; it keys what is drawn.
            decay: factor by which each weight shrinks first, by name; 1 where it is missing.
        """

    def finish(self, step: int, decay: Mapping[str, float]) -> nn.Module:
        """Leave the model, and return one that is what was learnt: the model itself, or it with an adapter."""
        self.fold(step, decay)
        self.clear_gradient()
        self.detach()
        return self.model

    def folded_state_dict(self, step: int, decay: Mapping[str, float] | None = None) -> dict[str, Tensor] | None:
        """A state dict of the model as `fold` would leave it, or None where the model is that already."""
        return None

    def _enter_point(self, stream_of: StreamOf, distribution: Distribution) -> None:
        """Prepare what `forward` needs for `self.probes`."""

    def _leave_point(self) -> None:
        """Drop what `_enter_point` prepared."""


def no_stream(direction: int) -> Stream:
    """For the current point itself, which needs no direction."""
    raise AssertionError("the current point needs no direction")


def first_input(args: Sequence, kwargs: Mapping) -> Tensor:
    """What a layer of one input was called with."""
    return args[0] if args else next(iter(kwargs.values()))


def require_equal_parts(x: Tensor, groups: int) -> None:
    """Refuse a linear layer's input whose first dimension, the batch's, does not hold one equal part for every probe.

    Raises:
        NotBatchable: it does not.
    """
    leading = x.shape[0] if x.ndim > 1 else 1
    if leading % groups:
        raise NotBatchable(f"a linear layer sees {leading} rows, which {groups} probes cannot share equally")


def _entered_forward(
    subspace: Subspace, module: nn.Module, previous: Callable | None, *args: Any, **kwargs: Any
) -> Any:
    original = previous if previous is not None else functools.partial(type(module).forward, module)
    layer = subspace.quantized.get(module)
    if layer is not None and layer.rounds_activations and subspace.probes:
        original = layer.forward
    if module in subspace._holders and subspace.probes:
        subspace.visited.add(module)
    if module not in subspace._holders or not subspace.moved(module):
        return original(*args, **kwargs)
    with nullcontext() if subspace._is_differentiable else torch.no_grad():
        return subspace.forward(module, original, args, kwargs)
