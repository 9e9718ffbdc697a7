"""The input of a layer, and its division among probes that share a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers.pytorch_utils import Conv1D

from zo_hf.estimators.probe import NotBatchable

#: Forwards that multiply their input by one weight, and add a bias.
LINEAR = (nn.Linear.forward, Conv1D.forward)


def first_input(args: Sequence, kwargs: Mapping) -> Tensor:
    """Return the input of a layer with a single input, of any shape."""
    return args[0] if args else next(iter(kwargs.values()))


def require_equal_parts(x: Tensor, groups: int, rows: int) -> None:
    """Refuse an input of a linear layer if its batch cannot be divided into one equal part per probe.

    Args:
        x: the input, (batch, ..., n) or (n,).
        groups: number of probes.
        rows: rows of the batch for each probe.

    Raises:
        NotBatchable: the first dimension is not that of the batch, or a multiple of it.
    """
    leading = x.shape[0] if x.ndim > 1 else 1
    if groups > 1 and not is_of_rows(leading, groups, rows):
        raise NotBatchable(f"a linear layer sees {leading} rows, which {groups} probes cannot share equally")


def is_of_rows(leading: int, groups: int, rows: int) -> bool:
    """Return whether a first dimension may be that of the batch, or a multiple of it, as that of all tokens is.

    Others are lengths, which may still be a multiple of the number of groups.

    Args:
        leading: size of the first dimension.
        groups: number of groups.
        rows: rows of the batch in each group.
    """
    return leading % (groups * max(1, rows)) == 0


def require_ids_of_rows(ids: Tensor, groups: int, rows: int) -> None:
    """Refuse ids without a dimension of rows, such as the distances of all positions, (length, length).

    Args:
        ids: (rows of the batch, ...), (1, ...) for all rows, or (groups, length, length) for a table of position biases.
        groups: number of groups.
        rows: rows of the batch in each group.

    Raises:
        NotBatchable: they have another first dimension.
    """
    leading, is_table = len(ids), ids.ndim == 3 and len(ids) == groups
    of_rows = leading == groups * rows if ids.ndim == 1 else is_of_rows(leading, groups, rows)
    of_rows = of_rows and not are_positions(ids)
    if leading != 1 and not is_table and not of_rows:
        raise NotBatchable(f"an embedding looks up {leading} positions that belong to no row")


def are_positions(ids: Tensor) -> bool:
    """Return whether ids count on, (length,), or are those of the distance of two positions, (length, length).

    A batch may have as many rows. Then its ids of tokens would hardly do either.
    """
    is_square = ids.ndim == 2 and ids.shape[0] == ids.shape[1]
    if len(ids) == 1 or not (ids.ndim == 1 or is_square):
        return False
    if ids.is_meta or isinstance(ids, FakeTensor) or torch.compiler.is_compiling():
        return False
    if _is_captured():  # a launched pass over the same ids has come before
        return False
    if ids.ndim == 1:
        return bool((ids.diff() == 1).all())
    return bool((ids[1:, 1:] == ids[:-1, :-1]).all()) and bool((ids != ids[0, 0]).any())


def is_transformed() -> bool:
    """Return whether torch.func transforms what runs, so that a result may not be written into a tensor of other inputs."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _is_captured() -> bool:
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError:  # torch without CUDA
        return False
