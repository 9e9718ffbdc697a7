"""One batch's loss, called at every probe as if it were called once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import Trainer

from zo_hf.evaluation.evaluate import one_number
from zo_hf.evaluation.row_losses import RowLosses
from zo_hf.rng.global_generators import GlobalGenerators
from zo_hf.trainer.detach_test import DetachTest
from zo_hf.trainer.loss_state import LossState
from zo_hf.trainer.side_effects import Snapshot
from zo_hf.trainer.stop_gradient import StopGradients


class LossCalls:
    """A Trainer's `compute_loss` of one batch, in the contexts that Trainer gives it.

    Every call begins with the same state, and leaves that of the first one: metrics, counts, queues, the batch. Values that
    the loss detaches are the first call's at every later one.

    Args:
        compute_loss: computes the loss of a batch, a scalar.
        trainer: the Trainer.
        detach_test: knows whether detached values matter to this loss.
        state: the state that the loss reads and changes.
        counts: False if even the first call leaves no effects, as in a search before training.

    Attributes:
        entries: number of losses at the current point, 0 if they were not `RowLosses`; None if it has not been evaluated
            there.
    """

    def __init__(
        self,
        compute_loss: Callable[[Any], Any],
        trainer: Trainer,
        detach_test: DetachTest,
        state: LossState,
        counts: bool = True,
    ) -> None:
        self._compute_loss, self._trainer, self._test = compute_loss, trainer, detach_test
        self._state = state
        self._stop_gradients, self._first = StopGradients(), 0.0
        self._before: Snapshot | None = None
        self._counts = counts
        self.entries: int | None = None

    def __call__(self, inputs: Any) -> Any:
        if self._state.is_stock or self._test.matters is False or self._stop_gradients.is_empty:
            return self._once(inputs)
        if self._test.matters is None:
            return self._test_at_probe(inputs)
        with self._stop_gradients:
            return self._once(inputs)

    @torch.no_grad()
    def at_current_point(self, inputs: Any, device: torch.device) -> None:
        """Evaluate the loss before any probe, for the values that it detaches, unless they do not matter."""
        if self._state.is_stock or self._test.matters is False:
            return
        before = GlobalGenerators.now(device)
        with self._stop_gradients:
            loss = self._once(inputs)
        before.restore()
        self.entries = len(loss) if isinstance(loss, RowLosses) else 0
        if not self._test.matters:
            self._first = one_number(loss, device).item()
            self._test.see_first(self._stop_gradients, loss, device)

    def _once(self, inputs: Any) -> Any:
        if not self._state.may_change:
            return self._evaluate(inputs)
        if self._before is not None:
            after = self._state.after(self._before)
            self._before.restore()
            try:
                with self._state.repeating():
                    return self._evaluate(inputs)
            finally:
                after.restore()
        self._before = self._state.before()
        generators = GlobalGenerators.now(self._trainer.args.device)
        believed = self._state.batches.are_written
        with nullcontext() if self._counts else self._state.repeating():
            loss = self._evaluate(inputs, is_first=True)
        is_new = believed is False and bool(self._state.batches.are_written)
        if self._state.finds_more(self._before) or is_new:
            # What it has written cannot be undone, so this and all later evaluations of the batch begin with that.
            generators.restore()
            loss = self._once(inputs)
        if not self._counts:
            self._before.restore()
        return loss

    def _evaluate(self, inputs: Any, is_first: bool = False) -> Any:
        context, watch = self._trainer.compute_loss_context_manager(), self._state.own_backward.watching()
        with context, watch, self._state.batches.lent(inputs, is_first) as lent:
            try:
                return self._compute_loss(lent)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                raise ValueError(
                    f"the loss of {type(self._trainer).__name__} takes a gradient of the trained model, which probes "
                    "evaluate without gradients; leave this term out of compute_loss, or add random noise instead of an "
                    "adversarial one."
                ) from error

    def _test_at_probe(self, inputs: Any) -> Any:
        device = self._trainer.args.device
        before = GlobalGenerators.now(device)
        moved = self._once(inputs)
        before.restore()
        with self._stop_gradients:
            loss = self._once(inputs)
        kept = one_number(loss, device).item()
        self._test.see(self._first, kept, one_number(moved, device).item(), device)
        return moved if kept == self._first else loss
