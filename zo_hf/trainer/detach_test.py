"""A test of whether the values that a loss detaches matter to it: metrics detach, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zo_hf.trainer.stop_gradient import StopGradients

#: Probes after which a loss that has moved with its detached values alone is believed to have no others.
PROBES_ALONE = 8


class DetachTest:
    """Finds out whether the values that a loss detaches matter to it.

    Args:
        all_reduce_and: turns this process's answer into the AND over all processes.

    Attributes:
        matters: the answer; None until a loss has given it.
    """

    def __init__(self, all_reduce_and: Callable[[Tensor], bool]) -> None:
        self._all_reduce_and = all_reduce_and
        self._alone = 0
        self.matters: bool | None = None

    def see_first(self, values: StopGradients, loss: Any, device: torch.device) -> None:
        """Note the loss of the first evaluation of a batch, and what it has detached."""
        has_none = values.is_empty or not isinstance(loss, Tensor)  # a number of Python has no gradient
        if self.matters is None and self._all_reduce_and(torch.tensor(has_none, device=device)):
            self.matters = False

    def see(self, first: float, kept: float, moved: float, device: torch.device) -> None:
        """Draw the conclusion from a probe's loss, if there is one.

        Args:
            first: the loss of the first evaluation; a probe with the same loss, as at the current point, tells nothing.
            kept: the loss at the probe, with the values of the first evaluation. If it is `first`, the loss may have no
                other values. Rounding can hide them, so only several such probes tell.
            moved: the loss at the probe, with its own values.
            device: device of the model.
        """
        if not self._all_reduce_and(torch.tensor(kept in (moved, first), device=device)):
            self.matters = True
        elif self._all_reduce_and(torch.tensor(kept != first, device=device)):
            self.matters = False
        elif self._all_reduce_and(torch.tensor(kept == first != moved, device=device)):
            self._alone += 1
            if self._alone == PROBES_ALONE:
                self.matters = False
