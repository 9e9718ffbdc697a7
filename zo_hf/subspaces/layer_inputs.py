"""The input of a layer with one input, and its division among probes that share a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from zo_hf.estimators.probe import NotBatchable


def first_input(args: Sequence, kwargs: Mapping) -> Tensor:
    """Return the input of a layer with a single input, of any shape."""
    return args[0] if args else next(iter(kwargs.values()))


def require_equal_parts(x: Tensor, groups: int) -> None:
    """Refuse an input of a linear layer if its batch cannot be divided into one equal part per probe.

    Args:
        x: the input, (batch, ..., n) or (n,).
        groups: number of probes.

    Raises:
        NotBatchable: the size of the batch is not a multiple of `groups`.
    """
    leading = x.shape[0] if x.ndim > 1 else 1
    if leading % groups:
        raise NotBatchable(f"a linear layer sees {leading} rows, which {groups} probes cannot share equally")
