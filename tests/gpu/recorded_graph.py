"""A CUDA graph without CUDA: the operations of a function are recorded, and repeated on the very tensors that they had.

As with a graph, addresses and numbers stay those of the recording, a read by the host is an error, and what is captured is
all that a replay does: Python does not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "allclose")
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class RecordedGraph(TorchDispatchMode):
    """Records operations inside a `with`, and repeats them.

    Attributes:
        replays: how often it has been repeated.
    """

    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").removeprefix("prim::")
        if name in _READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = func(*args, **kwargs)
        if not func.is_view and name not in _EMPTY:
            self._done.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        """Repeat everything, and write what an operation returned to where it was.

        A graph's replay is no call of torch's functions, so none of their modes sees it.
        """
        self.replays += 1
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for func, args, kwargs, result in self._done:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextmanager
def recorded_graphs() -> Iterator[list[RecordedGraph]]:
    """Let `PassGraphs` record on the CPU, inside of this context; yields the graphs in the order of their recording."""
    made: list[RecordedGraph] = []

    def capture(run: Callable[[], Tensor], device: torch.device, pool: Any) -> tuple[RecordedGraph, Tensor, Any]:
        run()
        graph = RecordedGraph()
        # transformers then makes no mask by values.
        with mock.patch("torch.cuda.is_current_stream_capturing", lambda: True), graph:
            losses = run()
        losses.fill_(float("nan"))  # as a capture computes nothing
        made.append(graph)
        return graph, losses, None

    with (
        mock.patch("zo_hf.evaluation.pass_graphs.capture", capture),
        mock.patch("zo_hf.evaluation.pass_graphs.DEVICE", "cpu"),
    ):
        yield made
