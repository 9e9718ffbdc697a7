"""Tensors on a CUDA device that does not exist: what a step would launch there, and where it would wait.

Tensors on the device are torch's fake tensors, which have a shape, a dtype and a device, and no values. Tensors on the CPU
are real, so that code which decides by them decides as it would. An operation that mixes the two devices raises, as on a
GPU. Every operation is counted as it reaches the device:

    launch      an operation that computes on the device; a view or an allocation is none
    read        the host waits for a value: `.item()`, `.tolist()`, `nonzero`, a copy to the CPU
    upload      a copy from memory of the host that is not pinned, for which the host waits, too

What a read returns is made up, see `_made_up`. Attention counts as one launch, as flash attention is. Torch's foreach
operations count as many launches as the arguments of their kernels have room for. A kernel of zo_hf counts as one, and writes
nothing. A replay of a CUDA graph counts as one, and its capture as none.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from zo_hf.directions import distributions
from zo_hf.kernels import launch
from zo_hf.rng import philox_wide

CUDA = torch.device("cuda", 0)

_CUDA_SLOT, _META_SLOT, _SLOTS = 1, 14, 20  # of c10::DeviceType
# Tensors that fit into one launch of a foreach kernel, by the number of lists; blocks of a launch, elements of a block.
_TENSORS_OF_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_BLOCKS_OF_A_LAUNCH, _ELEMENTS_OF_A_BLOCK = 320, 65536

_aten = torch.ops.aten
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
# Views whose schema does not say so, and operations on metadata.
_NO_LAUNCH = _ALLOCATIONS | {"_unsafe_view", "_reshape_alias", "detach", "detach_", "alias", "lift_fresh", "device"}
_NO_LAUNCH |= {"is_same_size", "_has_same_storage_numel", "_make_dual", "_unpack_dual", "_fw_primal", "dim", "size"}


@dataclass
class Counts:
    """What has reached the device.

    Attributes:
        launches: launches by operation.
        reads: waits of the host for a value, by operation.
        uploads: copies to the device that wait, by operation.
    """

    launches: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        """Begin anew."""
        for counter in (self.launches, self.reads, self.uploads):
            counter.clear()

    @property
    def total(self) -> tuple[int, int, int]:
        """Launches, reads and uploads."""
        return self.launches.total(), self.reads.total(), self.uploads.total()


#: The files of kernels that are launched.
_KERNELS = ("fold", "layout_noise", "low_rank_product", "moved_norm", "perturbed_linear", "random_blocks")
_KERNELS += ("seeded_update", "slice_noise")


@contextmanager
def fake_cuda(kernels: bool = False) -> Iterator[Counts]:
    """Let code in this context use `CUDA`, and count what it does there; with kernels or without them."""
    _set_device_guard()
    counts = Counts()
    # Cached tensors, by their device.
    tables = (distributions._quantiles, distributions._to_sign_bit, philox_wide._multipliers, philox_wide._weyl)
    tables += (launch.on_device,)
    state = torch.get_rng_state()  # a real device keeps its generator's state on the host, too
    with (
        mock.patch("zo_hf.kernels.choice.why_not_on", lambda device: None if kernels else "there is no device"),
        _counted_kernels(counts) if kernels else nullcontext(),
        mock.patch("zo_hf.evaluation.pass_graphs.capture", functools.partial(_captured, counts)),
        mock.patch("zo_hf.evaluation.pass_graphs.address_of", lambda tensor: tensor.untyped_storage()._cdata),
        mock.patch("torch.cuda.get_rng_state", lambda device: state),
        mock.patch("torch.cuda.set_rng_state", lambda new, device: None),
        mock.patch.object(nn.Module, "to", lambda module, *where, **more: module),  # made where it stays
        mock.patch.object(FakeTensor, "tolist", lambda tensor: _tolist(counts, tensor)),
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        _Count(counts, fake),
        _Python(counts),
    ):
        try:
            yield counts
        finally:
            for table in tables:
                table.cache_clear()


def _captured(counts: Counts, run: Callable[[], Tensor], device: torch.device, pool: Any) -> tuple[Any, Tensor, Any]:
    before = Counts(counts.launches.copy(), counts.reads.copy(), counts.uploads.copy())
    losses = run()
    assert (counts.reads, counts.uploads) == (before.reads, before.uploads), "a capture must not wait"
    counts.launches = before.launches

    class Graph:
        def replay(self) -> None:
            counts.launches["graph"] += 1

    return Graph(), losses, None


@contextmanager
def _counted_kernels(counts: Counts) -> Iterator[None]:
    def launched(kernel: Any, programs: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        assert all(_is_cuda(argument) for argument in arguments if isinstance(argument, Tensor))
        counts.launches[kernel.fn.__name__.removeprefix("_")] += 1

    with ExitStack() as stack:
        for name in _KERNELS:
            module = importlib.import_module(f"zo_hf.kernels.{name}")
            stack.enter_context(mock.patch.object(module, "launch", launched))
        yield


class _Count(TorchDispatchMode):
    def __init__(self, counts: Counts, fake: FakeTensorMode) -> None:
        super().__init__()
        self._counts, self._fake = counts, fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor | torch.device)]
        if not any(_is_cuda(value) for value in given):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::").removeprefix("prim::")
        tensors = [value for value in given if isinstance(value, Tensor)]
        if name in ("_to_copy", "copy_"):
            return self._copy(func, name, tensors, args, kwargs)
        if name in ("_local_scalar_dense", "equal", "allclose"):
            self._counts.reads[name] += 1
            return _values((), args[0].dtype) if name == "_local_scalar_dense" else True
        if name in ("nonzero", "masked_select", "_unique2", "unique_dim"):
            self._counts.reads[name] += 1
            self._counts.launches[name] += 1
            return _of_made_up_size(name, args)
        self._launch(func, name, args, tensors)
        return func(*args, **kwargs)

    def _copy(self, func: Any, name: str, tensors: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
        source = tensors[-1]
        target = tensors[0].device if name == "copy_" else kwargs.get("device") or source.device
        if _is_cuda(source) and target.type == "cpu":
            self._counts.reads[name] += 1
            values = _made_up(source.shape, kwargs.get("dtype") or source.dtype)
            with unset_fake_temporarily():
                return values if name == "_to_copy" else tensors[0].copy_(values)
        if not _is_cuda(source):
            if source.ndim or name == "_to_copy":
                waits = not source.is_pinned() if not isinstance(source, FakeTensor) else True
                self._counts.uploads[name] += waits
            func_args = tree_map_only(Tensor, lambda t: t if _is_cuda(t) else self._fake.from_tensor(t), args)
            return func(*func_args, **kwargs)
        self._counts.launches[name] += 1
        return func(*args, **kwargs)

    def _launch(self, func: Any, name: str, args: Any, tensors: Sequence[Tensor]) -> None:
        if func.is_view or name in _NO_LAUNCH:
            return
        self._counts.uploads[name] += sum(not _is_cuda(t) and t.ndim > 0 for t in tensors)
        self._counts.launches[name] += _foreach_launches(args) if name.startswith("_foreach") else 1


class _Python(TorchFunctionMode):
    """What happens in torch's own Python and C++ code above the dispatcher."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and _is_cuda(args[0]):
            self._counts.launches["attention"] += 1
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **kwargs)


def _is_cuda(value: Any) -> bool:
    return (value if isinstance(value, torch.device) else value.device).type == "cuda"


def _tolist(counts: Counts, tensor: Tensor) -> Any:
    counts.reads["tolist"] += 1
    return _values(tensor.shape, tensor.dtype)


def _values(shape: Sequence[int], dtype: torch.dtype) -> Any:
    made_up = _made_up(shape, dtype)
    with unset_fake_temporarily():
        return made_up.tolist()


def _made_up(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return values that are True, 1, or close to 1 and different from each other."""
    with unset_fake_temporarily():
        count = torch.Size(shape).numel()
        if not dtype.is_floating_point:
            return torch.ones(shape, dtype=dtype)
        return (1 + torch.arange(count, dtype=torch.float64) / (1000 * max(1, count))).to(dtype).view(shape)


def _of_made_up_size(name: str, args: Any) -> Any:
    """Return the result of an operation whose size depends on values: as if one element were chosen, or all differed."""
    source = args[0]
    if name == "nonzero":
        return source.new_empty(1, source.ndim, dtype=torch.int64)
    if name == "masked_select":
        return source.new_empty(1)
    indices = source.new_empty(source.shape, dtype=torch.int64)
    return source.new_empty(source.numel()), indices, indices.new_empty(0)


def _foreach_launches(args: Any) -> int:
    lists = [value for value in args if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor)]
    most, launches, tensors, blocks = _TENSORS_OF_A_LAUNCH[min(5, len(lists))], 1, 0, 0
    for tensor in lists[0]:
        tensors += 1
        blocks += -(-tensor.numel() // _ELEMENTS_OF_A_BLOCK)
        if tensors == most or blocks >= _BLOCKS_OF_A_LAUNCH:
            launches += max(1, blocks // _BLOCKS_OF_A_LAUNCH)
            tensors, blocks = 0, 0
    return launches if tensors else max(1, launches - 1)


def _set_device_guard() -> None:
    """Give a build of torch without CUDA the guard of the meta device, which does nothing, for CUDA as well."""
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    guards = (ctypes.c_void_p * _SLOTS).in_dll(ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE")
    if not guards[_CUDA_SLOT]:
        guards[_CUDA_SLOT] = guards[_META_SLOT]
