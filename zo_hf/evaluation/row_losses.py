"""Losses that come apart by rows: the protocol of the engine, and a mark for a loss of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from zo_hf.estimators.probe import NotBatchable


@runtime_checkable
class GroupedLoss(Protocol):
    """A loss that is the sum of shares of groups of rows.

    Attributes:
        rows: rows of the batch.
    """

    rows: int

    def __call__(self) -> Tensor: ...

    def by_groups(self, groups: int) -> Tensor:
        """Return the shares of `groups` equal groups of consecutive rows, (groups,), from one forward pass."""


class RowLosses(Tensor):
    """One loss for every row of a batch, which a closure or `compute_loss` returns instead of one number.

        zo.estimate(lambda: RowLosses(cross_entropy(model(x), y, reduction="none")))

    The loss of the batch is their mean. With `rows_per_direction`, every row or group of rows has a direction of its
    own. Entry i may depend on row i of the model's inputs alone.

    Args:
        losses: (rows,), of any dtype. Operations on the object itself give plain tensors.

    Raises:
        ValueError: `losses` has another shape, or no entry.
    """

    # Whatever a reader computes from it, for example the mean that Trainer logs, is no loss for every row.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, losses: Tensor) -> RowLosses:
        if not isinstance(losses, Tensor) or losses.ndim != 1 or not len(losses):
            shape = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"type {type(losses).__name__}"
            raise ValueError(f"losses has {shape}; RowLosses takes a tensor with one loss for every row, (rows,).")
        return losses.as_subclass(cls)

    def mean_loss(self) -> Tensor:
        """Return the loss of the batch, (), in float32 or float64."""
        return self.mean(dtype=torch.promote_types(self.dtype, torch.float32))

    def shares(self, groups: int, rows: int) -> Tensor:
        """Return the shares of `groups` groups of consecutive rows in the mean, (groups,), in the same dtype.

        Groups differ by one row at most.

        Args:
            groups: the number of groups.
            rows: rows of the batch.

        Raises:
            NotBatchable: there is not one entry for every row.
        """
        if len(self) != rows:
            raise NotBatchable(f"RowLosses has {len(self)} entries for a batch of {rows} rows")
        precise = self.to(torch.promote_types(self.dtype, torch.float32))
        if rows % groups == 0:
            return precise.view(groups, -1).sum(1) / rows
        group_of = torch.arange(rows, device=self.device) * groups // rows
        return precise.new_zeros(groups).index_add(0, group_of, precise) / rows


class LossByRows:
    """The loss of a batch for which a closure returns `RowLosses`.

    Args:
        closure: evaluates the model.
        rows: rows of the batch, or the sequences that are packed into it.
        whole: evaluates the same loss as one number, if that takes another way; `closure` by default.
        model_rows: rows of the model's inputs, such as two for each pair; `rows` by default.
        kept: positions for which the model computes logits, int64 (positions,); None if for all.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        rows: int,
        whole: Callable[[], Any] | None = None,
        model_rows: int | None = None,
        kept: Tensor | None = None,
    ) -> None:
        self.closure, self.rows, self.kept = closure, rows, kept
        self.model_rows = rows if model_rows is None else model_rows
        self._whole = closure if whole is None else whole

    def __call__(self) -> Any:
        """Return the loss of the batch."""
        return self._whole()

    def by_groups(self, groups: int, group_of: Tensor | None = None) -> Tensor:
        """Return the shares of groups of consecutive rows in the mean, (groups,), from one forward pass.

        Args:
            groups: the number of groups.
            group_of: the group of every position, see `PackedLoss`; entries are in the order of the groups already.

        Raises:
            NotBatchable: the closure returns another loss, or another number of rows.
        """
        return self.losses_of_rows().shares(groups, self.rows)

    def losses_of_rows(self) -> RowLosses:
        """Return the loss of every row, (rows,), from one forward pass.

        Raises:
            NotBatchable: the closure returns another loss.
        """
        losses = self.closure()
        if not isinstance(losses, RowLosses):
            raise NotBatchable("the loss is not RowLosses, one for every row")
        return losses


def model_rows(loss: Any) -> int:
    """Return the rows that a loss which comes apart, or shares a forward pass, has in the model's inputs."""
    return loss.model_rows if isinstance(loss, LossByRows) else loss.rows
