"""A callback that lowers the learning rate of `learning_rate="auto"` if the losses of the run rise.

It needs no forward pass: see `zo_hf.lr_finder.loss_watch`. A checkpoint holds its state in `trainer_state.json`, and the lower
rate in the state of the schedule and of the optimizer.
"""

from __future__ import annotations

import logging
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from zo_hf.lr_finder.find import LRFinderResult
from zo_hf.lr_finder.loss_watch import LossWatch

logger = logging.getLogger(__name__)

#: The divisor of the rate if the losses rise, and if they rise above the loss before training.
DIVISOR, DIVISOR_ABOVE_FIRST = 2.0, 4.0


class RateWatch(TrainerCallback, ExportableState):
    """Watches the losses of a run whose learning rate was searched for.

    Attributes:
        loss: the loss of the step that is about to be taken; the trainer sets it.
        watch: the watch over the losses; None if the rate was not searched for.
        divisor: the number by which the found rate has been divided so far.
    """

    def __init__(self) -> None:
        self.begin(False, None)

    def begin(self, is_searched: bool, result: LRFinderResult | None) -> None:
        """Prepare for a run.

        Args:
            is_searched: True if the learning rate is "auto".
            result: the result of the search; None if the run is resumed.
        """
        self.loss: float | None = None
        self.divisor = 1.0
        self.watch: LossWatch | None = None
        if is_searched:
            probes = None if result is None else result.probes
            self.watch = LossWatch() if probes is None else LossWatch(probes.loss, probes.loss_deviation)

    def state(self) -> dict[str, Any]:
        """Return the state for `trainer_state.json`, in the form that Trainer asks for."""
        saved = None if self.watch is None else self.watch.state() | {"divisor": self.divisor}
        return {"args": {}, "attributes": {"saved": saved}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue the watch of a checkpoint."""
        entry: Any = (state.stateful_callbacks or {}).get(type(self).__name__)
        saved = entry["attributes"]["saved"] if entry and state.global_step else None
        if self.watch is not None and saved is not None:
            self.watch, self.divisor = LossWatch.from_state(saved), saved["divisor"]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lower the learning rate if the losses have risen."""
        watch = self.watch
        if watch is None or self.loss is None or (watch.first is not None and watch.first <= 0):
            return
        before = watch.level
        mean = watch.rises(self.loss)
        if mean is None or before is None or watch.first is None:
            return
        divisor = DIVISOR_ABOVE_FIRST if mean > watch.first else DIVISOR
        self.divisor *= divisor
        divide_learning_rate(kwargs["optimizer"], kwargs["lr_scheduler"], divisor)
        group = kwargs["optimizer"].param_groups[0]
        initial = float(group.get("initial_lr", group["lr"]))
        logger.warning(
            "step %d: the rate of learning_rate='auto' is too large: the loss is %.4g, after a minimum of %.4g (%.4g "
            "before training), so the rate is divided by %g; set learning_rate=%.2g to begin with the lower rate.",
            state.global_step,
            mean,
            before,
            watch.first,
            divisor,
            initial,
        )


def divide_learning_rate(optimizer: Optimizer, scheduler: Any, divisor: float) -> None:
    """Divide the learning rate of the next step and of all later ones.

    Args:
        optimizer: the optimizer.
        scheduler: its schedule, of any kind that torch or accelerate makes.
        divisor: the divisor.
    """
    for group in optimizer.param_groups:
        for key in ("lr", "initial_lr"):
            if key in group:
                group[key] = group[key] / divisor
    for part in (scheduler, getattr(scheduler, "scheduler", None), *getattr(scheduler, "_schedulers", ())):
        if getattr(part, "base_lrs", None) is not None:
            part.base_lrs = [rate / divisor for rate in part.base_lrs]
