"""Reads of parameters: which of them a probe has read, and the moved tensor for a read outside of a module's forward.

A subspace enters the forward of the module that holds a parameter. Some code reads the parameter elsewhere:

    hidden @ lm_head.weight.T       a loss that multiplies by the head itself
    self.conv1d.weight              a parent that calls a kernel with its children's weights (Mamba)
    module.weight_g                 a hook before the forward (torch.nn.utils.weight_norm)
    model.parameters()              a penalty on all weights

Such a read must give the moved tensor. `ReadWatch` therefore makes the parameters properties of the module, as torch's
own parametrizations do: the module gets a subclass of its class, and its table of parameters stays as it is. Most
modules get their class back after the first step, when all of their parameters have been read in their own forward.

A list of parameters is read through `Members`, and one that was made before through `HeldParameters`. Code often reads only
a parameter's dtype, device or shape. Until a first operation on the values tells the difference, a read outside gives an
`Unresolved` tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_map

from zo_hf.estimators.probe import NotBatchable, Probe
from zo_hf.parallel.shards import is_sharded
from zo_hf.subspaces.entries import MEMBERS, Members, note_method
from zo_hf.subspaces.functional import HALF
from zo_hf.subspaces.held_parameters import LOOK_EVERY, NAME, HeldParameters, refuse_write, writes
from zo_hf.subspaces.layer_inputs import is_transformed
from zo_hf.subspaces.sites import Site

_KEY = "_zo_reads"

# These modules call fused kernels with the parameters of their children. The kernels refuse a subclass of Tensor.
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)

# Properties and methods of a tensor that do not depend on its values.
_PROPERTIES = "dtype device shape ndim layout requires_grad is_leaf is_meta is_cuda is_cpu is_mps is_xpu is_sparse"
_PROPERTIES += " is_quantized is_nested is_mkldnn grad grad_fn names itemsize nbytes"
_METHODS = "size dim numel nelement ndimension stride is_contiguous is_floating_point is_complex element_size"
_METHODS += " get_device __len__ __hash__ storage_offset has_names is_signed is_inference"
_METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES.split() if hasattr(Tensor, name)}
_METADATA |= {getattr(Tensor, name) for name in _METHODS.split() if hasattr(Tensor, name)}
_METADATA |= {torch.numel, torch.is_floating_point, torch.is_complex, torch.is_signed}


_SETTERS = {Tensor.requires_grad_, *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad"))}


class Movable(Protocol):
    """The part of a subspace that reads need; see `Subspace`."""

    model: nn.Module
    sites: list[Site]
    probes: Sequence[Probe]
    loader: Any

    @property
    def is_moved(self) -> bool: ...

    def parameter_at_point(self, site: Site, module: nn.Module, parameter: Tensor) -> Tensor: ...


class ModuleReads:
    """The watched parameters of one module.

    Args:
        watch: the watch of the whole model.
        module: the module that holds the parameters.
        sites: sites of the watched parameters, by their names in the module.
        readers: modules whose forward the subspace enters for a parameter, by the parameter's name in the module.
    """

    def __init__(
        self, watch: ReadWatch, module: nn.Module, sites: dict[str, Site], readers: dict[str, set[nn.Module]]
    ) -> None:
        self.watch, self.module, self.sites, self.readers = watch, module, sites, readers

    def read(self, holder: nn.Module, attribute: str, raw: Tensor) -> Tensor:
        """Return the tensor that a read of `holder.attribute` gives.

        Args:
            holder: the module, or a stand-in for it, whose parameters have moved already.
            attribute: name of the parameter in the module.
            raw: the parameter in the holder's table.
        """
        watch, name = self.watch, self.sites[attribute].name
        if holder is not self.module or self.runs(attribute):
            watch.note(name)
            return raw
        if torch.compiler.is_compiling() or not watch.subspace.is_moved:
            return raw
        if (self.module, attribute) in watch.elsewhere:
            return self.moved(attribute, raw)
        if not watch.subspace.probes or is_sharded(raw):
            return raw
        return self.unresolved(attribute, raw)

    def runs(self, attribute: str) -> bool:
        """Return whether an entered forward that reads the parameter is running, for which it has moved already."""
        return not self.watch.running.isdisjoint(self.readers[attribute])

    def unresolved(self, attribute: str, raw: Tensor) -> Tensor:
        """Return a stand-in for the parameter that moves it when an operation needs its values."""
        made = raw.detach().as_subclass(Unresolved)
        made.reads, made.attribute, made.raw = self, attribute, raw
        setattr(made, NAME, self.sites[attribute].name)
        if raw.requires_grad and not is_transformed():  # vmap refuses it
            with torch._C.DisableTorchFunctionSubclass():
                made.requires_grad_()
        made._is_param = True  # for isinstance(..., nn.Parameter)
        return made

    def moved(self, attribute: str, raw: Tensor) -> Tensor:
        """Return the parameter at the current point, and take note that it is read here."""
        site, subspace = self.sites[attribute], self.watch.subspace
        self.watch.elsewhere.add((self.module, attribute))
        if len(subspace.probes) > 1:
            raise NotBatchable(
                f"{site.name} is read outside of its module's forward, where probes cannot share a batch"
            )
        self.watch.note(site.name)
        value: Any = subspace.parameter_at_point(site, self.module, raw)
        value._is_param = True
        setattr(value, NAME, site.name)
        return value


class Unresolved(Tensor):
    """A parameter that was read, perhaps only for its dtype or shape; it is resolved when its values are needed."""

    reads: ModuleReads
    attribute: str
    raw: Tensor
    _at_point: Tensor | None = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Sequence = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _SETTERS:  # of the parameter itself, such as an adapter that is switched off for a while
            function(args[0].raw, *args[1:], **kwargs)
        if _reads_no_values(function):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        refuse_write((*args[: writes(function)], kwargs.get("out")), lambda _: None)
        args, kwargs = tree_map(_resolved, (tuple(args), kwargs))
        return function(*args, **kwargs)


def _resolved(value: Any) -> Any:
    if not isinstance(value, Unresolved):
        return value
    if value.reads.runs(value.attribute):  # torch.func.functional_call gives a module what its list of parameters has
        return value.raw
    # Kept with the tensor, because a kernel may use the address that one call returns in the next call.
    if value._at_point is None:
        value._at_point = value.reads.moved(value.attribute, value.raw)
    return value._at_point


def _reads_no_values(function: Any) -> bool:
    return function in _METADATA or function in _SETTERS


def must_read(module: nn.Module, attribute: str, site: Site) -> bool:
    """Return True if a parameter must be moved by its reads, although the module's own forward reads it.

    A forward that is a closure over the module reads the module itself, so a stand-in would not reach it. And in half
    precision an entered module computes in float32. Its children would then get inputs of another dtype than their
    weights.
    """
    if site.layer is None and not note_method(module):
        return True
    if "." in attribute or site.layer is not None or site.parameter.dtype not in HALF:
        return False
    return any(p.dtype in HALF for child in module.children() for p in child.parameters())


class ReadWatch:
    """The reads of a subspace's parameters.

    Args:
        subspace: the subspace.

    Attributes:
        running: modules whose entered forward is running.
        read_names: names of the sites that a probe has read.
        elsewhere: pairs (module, name of the parameter) that are read outside of an entered forward.
        held: replaces parameters that a loss holds from before.
        is_compiled: True if compiled code has entered a forward. A mode would have it compiled again, and it is left alone.
    """

    is_compiled = False

    def __init__(self, subspace: Movable) -> None:
        self.subspace = subspace
        self.running: set[nn.Module] = set()
        self.read_names: set[str] = set()
        self.elsewhere: set[tuple[nn.Module, str]] = set()
        self._read_here: set[str] = set()
        self._watched: dict[nn.Module, ModuleReads] = {}
        self._evaluates = False
        self._lists: list[nn.Module] = []
        self._listed: dict[nn.Parameter, tuple[ModuleReads, str]] = {}
        self._readers: dict[nn.Parameter, set[nn.Module]] = {}
        self.held = HeldParameters(self._held_name, self._held_moved, _reads_no_values)
        self._looks_for_held = subspace.loader is None
        fused = {m for kind in subspace.model.modules() if isinstance(kind, _FUSED) for m in kind.modules()}
        for module, record in _records(self, subspace.sites).items():
            self._watched[module] = record
            for attribute, site in record.sites.items():
                self._listed.setdefault(site.parameter, (record, attribute))
                self._readers.setdefault(site.parameter, set()).update(record.readers[attribute])
            if module in fused:
                self.elsewhere |= {(module, attribute) for attribute in record.sites}

    def note(self, name: str) -> None:
        """Take note of a read; only those of probes count."""
        if self.subspace.probes:
            self.read_names.add(name)
            self._read_here.add(name)

    def unread(self) -> set[str]:
        """Return the names of the sites that no probe has read yet."""
        return {site.name for site in self.subspace.sites} - self.read_names

    @contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """Mark that the entered forward of a module is running."""
        if module in self.running:
            yield
            return
        self.running.add(module)
        try:
            yield
        finally:
            self.running.discard(module)

    def listed(self, parameter: Any) -> Any:
        """Return what a list of parameters has in place of one: the moved tensor, once a loss reads the values.

        Between losses, it has the parameter itself, which optimizers and callbacks write.
        """
        is_read = bool(self.subspace.probes or self.running or self._evaluates) and self.subspace.is_moved
        if isinstance(parameter, FakeTensor):  # a plan, which has no values
            return parameter
        record = self._listed.get(parameter) if is_read and not torch.compiler.is_compiling() else None
        return parameter if record is None or is_sharded(parameter) else record[0].unresolved(record[1], parameter)

    def _held_name(self, parameter: nn.Parameter) -> str | None:
        """Return the name of a parameter, or None if it is read where it has moved already, or does not move."""
        record = self._listed.get(parameter) if self.subspace.is_moved else None
        if record is None or is_sharded(parameter) or not self.running.isdisjoint(self._readers[parameter]):
            return None
        return record[0].sites[record[1]].name

    def _held_moved(self, parameter: nn.Parameter) -> Tensor:
        record, attribute = self._listed[parameter]
        return record.moved(attribute, parameter)

    def finding_held(self) -> AbstractContextManager[Any]:
        """Return a context for a loss, in which parameters that it holds from before have the values of the point."""
        return self.held if self._looks_for_held else nullcontext()

    def look(self, step: int, has_held: bool) -> None:
        """Decide whether the losses of a step are searched for parameters that they hold from before.

        Args:
            step: number of the step.
            has_held: True if an earlier step has found some.
        """
        self.held.has_replaced = has_held
        is_due = step % LOOK_EVERY == 0 and not self.is_compiled
        self._looks_for_held = self.subspace.loader is None and (has_held or is_due)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Mark that a loss is evaluated at the current point, without a probe."""
        before, self._evaluates = self._evaluates, True
        try:
            with self.held if self.held.has_replaced else nullcontext():
                yield
        finally:
            self._evaluates = before

    def list_moved(self, *modules: nn.Module) -> None:
        """Let lists of parameters of these modules, such as a compiled wrapper of the model, have the moved ones."""
        for module in modules:
            if MEMBERS not in module.__dict__:
                module.__dict__[MEMBERS] = Members(_members, self, module)
                self._lists.append(module)

    def begin(self) -> None:
        """Watch the modules."""
        self.list_moved(*self.subspace.model.modules())
        for module, record in self._watched.items():
            if _KEY not in module.__dict__:
                module.__dict__[_KEY] = record
                kind: Any = type(module)
                module.__class__ = _watching(kind, tuple(record.sites))

    def settle(self) -> None:
        """Stop watching the modules of which all parameters have been read, and in an entered forward only."""
        for module, record in list(self._watched.items()):
            names = {site.name for site in record.sites.values()}
            if names <= self._read_here and not any((module, a) in self.elsewhere for a in record.sites):
                _restore(module)
                del self._watched[module]

    def end(self) -> None:
        """Stop watching all modules."""
        for module in self._watched:
            _restore(module)
        for module in self._lists:
            module.__dict__.pop(MEMBERS, None)
        self._lists.clear()


def _records(watch: ReadWatch, sites: Iterable[Site]) -> dict[nn.Module, ModuleReads]:
    records: dict[nn.Module, ModuleReads] = {}
    for site in sites:
        if site.layer is not None:  # its codes are read by its own kernel only
            continue
        for reader, path in site.uses:
            holder = reader
            *children, attribute = path.split(".")
            for child in children:
                holder = holder._modules[child]  # type: ignore[assignment]
            record = records.setdefault(holder, ModuleReads(watch, holder, {}, {}))
            record.sites[attribute] = site
            readers = record.readers.setdefault(attribute, set())
            if must_read(reader, path, site):
                watch.elsewhere.add((holder, attribute))
            else:
                readers.add(reader)
    return records


def _members(watch: ReadWatch, module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
    """Yield what `module._named_members` does, on which `parameters` and `buffers` rest."""
    for name, member in nn.Module._named_members(module, *args, **kwargs):
        yield name, watch.listed(member)


def _restore(module: nn.Module) -> None:
    if module.__dict__.pop(_KEY, None) is not None:
        module.__class__ = type(module)._zo_kind  # type: ignore[attr-defined]


@functools.cache
def _watching(kind: Any, attributes: tuple[str, ...]) -> Any:
    """Make a subclass of a module's class in which some parameters are properties."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # The subclass has no importable name, so a copy makes it anew.
        _, _, *state = super(made, self).__reduce_ex__(protocol)
        return (_new, (kind, attributes), *state)

    namespace: dict[str, Any] = {name: property(_getter(name)) for name in attributes}
    namespace |= {"_zo_kind": kind, "__reduce_ex__": reduce, "__module__": kind.__module__, "__doc__": kind.__doc__}
    namespace |= {"__qualname__": kind.__qualname__}
    made = type(kind)(kind.__name__, (kind,), namespace)
    return made


def _new(kind: Any, attributes: tuple[str, ...]) -> Any:
    made = _watching(kind, attributes)
    return made.__new__(made)


def _getter(attribute: str) -> Callable[[nn.Module], Tensor | None]:
    def get(module: nn.Module) -> Tensor | None:
        parameters = module.__dict__["_parameters"]
        if attribute not in parameters:
            raise AttributeError(attribute)
        raw, record = parameters[attribute], module.__dict__.get(_KEY)
        return raw if raw is None or record is None else record.read(module, attribute, raw)

    return get
