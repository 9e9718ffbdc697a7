"""A Trainer whose subclasses may know how their loss comes apart by rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zo_hf.evaluation.row_losses import GroupedLoss
from zo_hf.trainer.described import DescribedTrainer


class TrainerByRows(DescribedTrainer):
    """Knows nothing about the rows of a loss of its own, which then shows by `RowLosses` if it comes apart."""

    def loss_by_rows(self, closure: Callable[[], Any], inputs: dict[str, Any]) -> GroupedLoss | None:
        """Return the loss of a batch in parts, or None if it is not known to come apart.

        Args:
            closure: evaluates `compute_loss`, and undoes the effects that it has on the Trainer beyond those of one call.
            inputs: the batch.
        """
        return None
