"""A loss that a function computes from the model's outputs and the labels, such as Trainer's `compute_loss_func`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.estimators.probe import NotBatchable
from zo_hf.evaluation.row_losses import RowLosses


class OutputLoss:
    """The loss of one batch: call it for the whole batch, or call `by_groups` for the shares of its rows.

    Args:
        forward: the module to call.
        inputs: the batch, with `labels`, which the module does not get.
        function: computes a loss from outputs, labels and `num_items_in_batch`, as Trainer calls `compute_loss_func`.
        sequential: computes the caller's loss of the whole batch.
        num_items_in_batch: see Trainer.
        factor: multiplies the shares, for a `sequential` that scales the function's loss.
    """

    def __init__(
        self,
        forward: nn.Module,
        inputs: Mapping[str, Any],
        function: Callable[..., Tensor],
        sequential: Callable[[dict[str, Any]], Tensor],
        num_items_in_batch: Tensor | int | None,
        factor: float,
    ) -> None:
        self._forward, self._inputs, self._function, self._sequential = forward, inputs, function, sequential
        self._num_items, self._factor = num_items_in_batch, factor
        self.rows = len(inputs["labels"])

    def __call__(self) -> Tensor:
        """Return the loss at the current point, a scalar."""
        return self._sequential(dict(self._inputs))

    def by_groups(self, groups: int) -> Tensor:
        """Return the shares of `groups` equal groups of consecutive rows in the loss, (groups,), from one forward pass.

        Raises:
            NotBatchable: the loss is neither the sum nor the mean of its values for the groups.
        """
        inputs = dict(self._inputs)
        labels = inputs.pop("labels")
        outputs = self._forward(**inputs)
        whole = self._function(outputs, labels, num_items_in_batch=self._num_items)
        if isinstance(whole, RowLosses):
            return whole.shares(groups, self.rows) * self._factor
        size = self.rows // groups
        parts = torch.stack(
            [
                self._function(
                    _rows_of(outputs, start, start + size, self.rows),
                    labels[start : start + size],
                    num_items_in_batch=self._num_items,
                ).reshape(())
                for start in range(0, self.rows, size)
            ]
        )
        # A mean over labels is that of the rows in some batches only, so every batch is asked.
        for shares in (parts, parts / groups):
            if torch.isclose(shares.sum(), whole.reshape(()), rtol=1e-4, atol=1e-6):
                return shares * self._factor
        raise NotBatchable("the loss of a batch is neither the sum nor the mean of the losses of its rows")

    def losses_of_rows(self) -> RowLosses:
        """Return the function's value for every row by itself, (rows,), from one forward pass."""
        inputs = dict(self._inputs)
        labels = inputs.pop("labels")
        outputs = self._forward(**inputs)
        parts = [
            self._function(_rows_of(outputs, row, row + 1, self.rows), labels[row : row + 1], num_items_in_batch=None)
            for row in range(self.rows)
        ]
        # A function that returns RowLosses has one for its only row.
        return RowLosses(torch.stack([part.reshape(()) for part in parts]))


def _rows_of(outputs: Any, start: int, stop: int, rows: int) -> Any:
    """Return the outputs of rows start to stop - 1 of a batch; what has another first dimension stays whole."""
    if not isinstance(outputs, Mapping):
        raise NotBatchable(f"the model returns a {type(outputs).__name__}, whose rows are unknown")
    parts = {
        k: v[start:stop] if isinstance(v, Tensor) and v.ndim and len(v) == rows else v for k, v in outputs.items()
    }
    return type(outputs)(**parts)
