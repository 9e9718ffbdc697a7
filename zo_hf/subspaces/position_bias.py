"""Relative position biases for a batch whose groups of rows have tables of their own.

T5 and its relatives look a bias up for every pair of positions, once for the whole batch:

    buckets: (q, k)  ->  table: (q, k, heads)  ->  compute_bias: (1, heads, q, k)

No dimension carries the rows, so groups of rows could not have biases of their own. Here the table looks the buckets up
once for every group, as if they were a batch, and `compute_bias` returns a bias for every row, (rows, heads, q, k).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from zo_hf.estimators.probe import Probe
from zo_hf.subspaces.entries import Entry

_TABLE, _METHOD = "relative_attention_bias", "compute_bias"


class Grouped(Protocol):
    """The part of a subspace that biases need; see `Subspace`."""

    probes: Sequence[Probe]
    rows_per_probe: int

    def moved(self, module: nn.Module) -> bool: ...


def layers_with_bias(model: nn.Module, moving: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the layers that compute a position bias from a table among the modules `moving`."""
    tables = set(moving)
    return [
        layer
        for layer in model.modules()
        if layer._modules.get(_TABLE) in tables
        and callable(getattr(type(layer), _METHOD, None))
        and (_METHOD not in layer.__dict__ or isinstance(layer.__dict__[_METHOD], Entry))  # a copied model has entries
    ]


def enter(layers: Iterable[nn.Module], subspace: Grouped) -> None:
    """Give every layer a bias of its own for each group of rows."""
    for layer in layers:
        layer.__dict__[_METHOD] = Entry(_biases, subspace, layer)


def leave(layers: Iterable[nn.Module]) -> None:
    """Undo `enter`."""
    for layer in layers:
        layer.__dict__.pop(_METHOD, None)


def _biases(subspace: Grouped, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    compute: Callable = getattr(type(layer), _METHOD)
    groups, table = len(subspace.probes), layer._modules[_TABLE]
    assert table is not None
    if groups <= 1 or not subspace.moved(table):
        return compute(layer, *args, **kwargs)
    bias = compute(_with_table(layer, _Repeated(table, groups)), *args, **kwargs)  # (1, ..., heads, groups · q, k)
    bias = bias.unflatten(-2, (groups, -1)).movedim(-3, 0).squeeze(1)
    return bias.repeat_interleave(subspace.rows_per_probe, 0)


def _with_table(layer: nn.Module, table: Any) -> nn.Module:
    """Return a stand-in that shares everything with the layer except its table."""
    stand_in = object.__new__(type(layer))
    modules: Mapping[str, Any] = {**layer._modules, _TABLE: table}
    stand_in.__dict__.update(layer.__dict__, _modules=modules)
    return stand_in


class _Repeated:
    """A table that looks its ids up once for every group: (q, k) -> (groups · q, k, heads)."""

    def __init__(self, table: nn.Module, groups: int) -> None:
        self._table, self._groups = table, groups

    def __call__(self, ids: Tensor) -> Tensor:
        return self._table(ids.expand(self._groups, *ids.shape)).flatten(0, 1)

    @property
    def weight(self) -> Any:
        return self._table.weight
