"""CUDA graphs of the forward pass that all probes of a step share: one launch instead of hundreds.

A graph repeats its launches with the addresses and the numbers of its capture. Values that differ between steps must
therefore be in tensors that are never moved:

    rows of the batch     copied into tensors of the graph's own
    ξ ± ε·z               made before the pass, by few launches, in tensors that stay
    weights and bases     written in place by a fold

All else of a step stays with the host: keys of noise, c, whether the step is skipped, clipping, the rule and the optimizer.
So a graph takes whatever evaluates its probes in one batch, and a step has the result of its forward pass without a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from zo_hf.estimators.probe import NotBatchable
from zo_hf.kernels.launch import on_device
from zo_hf.offload import computing_devices
from zo_hf.reason import reason_of
from zo_hf.subspaces.subspace import Subspace

logger = logging.getLogger(__name__)

#: The kind of device that captures graphs.
DEVICE = "cuda"
#: Graphs of a run, each for batches of one shape.
MOST_GRAPHS = 16


class NotCapturable(ValueError):
    """Raised if a forward pass cannot become a graph; the message says what to use instead."""


@runtime_checkable
class CapturableLoss(Protocol):
    """A loss of several probes that depends on tensors and on plain numbers alone."""

    def pass_inputs(self) -> tuple[dict[str, Tensor], Hashable]:
        """Return the tensors that a forward pass reads, by name, and all else that it depends on."""

    def reading(self, tensors: Mapping[str, Tensor]) -> CapturableLoss:
        """Return the same loss with other tensors of these names."""


class Replayable(Protocol):
    """A captured forward pass."""

    def replay(self) -> None:
        """Compute it anew from what its tensors hold now."""


@dataclass(frozen=True)
class _PassGraph:
    """A graph, the tensors that it reads the batch from and writes losses to, and the addresses of all else that it reads."""

    graph: Replayable
    inputs: Mapping[str, Tensor]
    losses: Tensor
    addresses: tuple[int, ...]


class _Key(NamedTuple):
    """The case that a graph was captured for: it is replayed for no other."""

    parts: tuple[int, ...]
    others: Hashable
    shapes: tuple[tuple[str, torch.Size, torch.dtype], ...]
    probes: int


class PassGraphs:
    """The graphs of a run, one for every shape of its batches.

    Args:
        subspace: perturbs the model.

    Raises:
        ValueError: its weights are not on one CUDA device, or it is of a kind whose forward draws noise.
    """

    def __init__(self, subspace: Subspace) -> None:
        if subspace.device.type != DEVICE:
            raise ValueError(
                f"zo_cuda_graph=True needs weights on a CUDA device, and they are on {subspace.device.type}; use "
                "zo_cuda_graph=False."
            )
        if subspace.coordinate_blocks is None:
            raise ValueError(
                f"zo_cuda_graph=True would freeze the noise that zo_subspace={subspace.name!r} draws inside the forward "
                "pass; use zo_subspace='low_rank'."
            )
        devices = computing_devices(subspace.model)
        if len(devices) > 1:
            raise ValueError(
                f"zo_cuda_graph=True captures what one device does, and the model is on {', '.join(map(str, devices))}; use "
                "zo_cuda_graph=False."
            )
        subspace.stay_in_place()
        self._subspace = subspace
        # Of every module, because a parameter may be replaced in it.
        self._held = [part for m in subspace.model.modules() for part in (m._parameters, m._buffers) if part]
        self._graphs: dict[_Key, _PassGraph] = {}
        self._pool: Any = None
        self._has_warned = False

    def losses(self, loss: Any, parts: tuple[int, ...], run: Callable[[Any], Tensor]) -> Tensor:
        """Return what `run(loss)` returns inside of `Subspace.at`, from a graph.

        Args:
            loss: the loss of the batch.
            parts: the copies of the batch, (copies,), or the groups of its rows and the copies, (groups, copies).
            run: evaluates the loss in one forward pass.

        Raises:
            NotCapturable: the loss is not the model's own, or the forward pass waits for the device.
            NotBatchable: the probes cannot share a forward pass.
        """
        if not isinstance(loss, CapturableLoss):
            raise NotCapturable(
                "zo_cuda_graph=True needs the model's own loss, of which it knows all inputs; use zo_cuda_graph=False."
            )
        tensors, others = loss.pass_inputs()
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        key = _Key(parts, others, shapes, len(self._subspace.probes))
        graph = self._graphs.pop(key, None)
        if graph is None or graph.addresses != self._addresses():
            graph = None  # gives its memory back first
            graph = self._captured(loss, tensors, run)
        self._keep(key, graph)
        torch._foreach_copy_(list(graph.inputs.values()), [tensors[name] for name in graph.inputs])
        graph.graph.replay()
        return graph.losses.clone()  # which the next replay overwrites

    def _captured(
        self, loss: CapturableLoss, tensors: Mapping[str, Tensor], run: Callable[[Any], Tensor]
    ) -> _PassGraph:
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        reading = loss.reading(own)
        run(reading)  # makes and compares what is made and compared once

        def launched() -> Tensor:
            # A graph that found weights already cast would read these copies, which the end of autocast gives away.
            torch.clear_autocast_cache()
            return run(reading).detach()

        try:
            graph, losses, self._pool = capture(launched, self._subspace.device, self._pool)
        except (NotBatchable, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = reason_of(error)
            raise NotCapturable(
                f"zo_cuda_graph=True cannot capture the forward pass of this model ({reason}); use zo_cuda_graph=False."
            ) from error
        finally:
            torch.clear_autocast_cache()  # of the copies that the graph makes, which have no value before a replay
        return _PassGraph(graph, own, losses, self._addresses())

    def _keep(self, key: _Key, graph: _PassGraph) -> None:
        """Keep a graph as the one that was used last, and give the one up that was used least recently if there are many."""
        self._graphs[key] = graph
        if len(self._graphs) <= MOST_GRAPHS:
            return
        varying = self._what_varies()
        del self._graphs[next(iter(self._graphs))]
        if not self._has_warned:
            logger.warning(
                "batches have more than %d shapes, which differ in %s, and zo_cuda_graph captures every new one; pad "
                "them to few lengths, as with pad_to_multiple_of, and label equally many positions",
                MOST_GRAPHS,
                ", ".join(varying),
            )
        self._has_warned = True

    def _what_varies(self) -> list[str]:
        """Return the names of the tensors whose shapes differ between the graphs."""
        seen: dict[str, set[Hashable]] = {}
        for key in self._graphs:
            for name, shape, dtype in key.shapes:
                seen.setdefault(name, set()).add((shape, dtype))
        return sorted(name for name, shapes in seen.items() if len(shapes) > 1) or ["other inputs"]

    def _addresses(self) -> tuple[int, ...]:
        """Return where everything lies that a pass at the present probes reads and that is not of the batch."""
        held = (tensor for part in self._held for tensor in part.values() if tensor is not None)
        return tuple(map(address_of, held)) + tuple(map(address_of, self._subspace.read_at_point()))


def address_of(tensor: Tensor) -> int:
    """Return the address of a tensor's first element."""
    return tensor.data_ptr()


def capture(run: Callable[[], Tensor], device: torch.device, pool: Any) -> tuple[Replayable, Tensor, Any]:
    """Capture a graph of what `run` launches.

    Args:
        run: computes losses from tensors that stay where they are.
        device: the CUDA device.
        pool: the memory of other graphs, which are never replayed at the same time; None for new memory.

    Returns:
        The graph, the losses that a replay writes, and the memory for the next graph.
    """
    with torch.cuda.device(device):
        # Workspaces belong to a stream, and a capture takes one of its own.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # A number that was put on the device before the capture may be gone at a replay. One that is put there by the
        # capture has no value before a replay.
        on_device.cache_clear()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=aside):
                losses = run()
        finally:
            on_device.cache_clear()
        return graph, losses, graph.pool()
