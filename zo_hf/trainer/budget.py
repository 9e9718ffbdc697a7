"""Runs that end when their forward passes or their time are spent, instead of after a number of steps.

The cost of a step is known before it begins. Every micro-batch costs forward passes for the step's probes, for the rule's
own evaluations, and for a measurement of the curvature. The rule's evaluations may vary from step to step. The first step
evaluates the probes of one micro-batch twice if `zo_batched_probes="auto"` compares both ways, and a few more if rows get
directions of their own. How many, only the step itself shows: the budget must pay for the most. A step that might exceed the
budget does not begin.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_utils import has_length
from transformers.training_args import OptimizerNames

from zo_hf.engine import ZerothOrder
from zo_hf.estimators import Estimator
from zo_hf.evaluation.curvature_probes import curvature_probes
from zo_hf.evaluation.first_batch import passes_of_check, passes_of_joined
from zo_hf.evaluation.private_rows import PASSES_OF_CHECK
from zo_hf.lr_finder.find import SHARE, forward_passes_of_search
from zo_hf.parallel.ranks import Ranks
from zo_hf.rules.step_probes import forward_passes_of_a_step
from zo_hf.trainer.config import ZOConfig
from zo_hf.trainer.finished import why_finished
from zo_hf.trainer.optimizer import divides
from zo_hf.trainer.streams import StreamTrainer

logger = logging.getLogger(__name__)

# Measuring a step of these takes probes of its own, from the second step on.
ADAM = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)

#: The costs of a longer period are estimated from its beginning. The run still ends where its forward passes do.
_LONGEST_PERIOD = 100_000


class Budget(TrainerCallback):
    """Ends a training as `max_steps` would, with the evaluation and the checkpoint that are due at its end.

    Args:
        args: arguments of the run.

    Attributes:
        is_spent: True if no further step may begin.
        seconds_before: time in seconds that the run had taken up to the checkpoint from which it was resumed.
    """

    def __init__(self, args: ZOConfig) -> None:
        self._begin(args, None, args.zo_stability_steps, False)

    def _begin(self, args: ZOConfig, divides: bool | None, stability_steps: int, searches: bool) -> None:
        self.args, self._divides = args, args.optim in ADAM if divides is None else divides
        self._settings, self._stability_steps, self._searches = args.settings(), stability_steps, searches
        self._passes: dict[bool, int] = {}
        self.is_spent = False
        self.seconds_before, self._began = 0.0, monotonic()
        self._zo: ZerothOrder | None = None
        self._losses: Any = None
        self._ranks = Ranks()
        self._replaces_max_steps = args.zo_max_forward_passes is not None and args.max_steps <= 0
        self._batches: int | None = None

    @contextmanager
    def of(
        self, args: ZOConfig, divides: bool | None = None, stability_steps: int = 0, searches: bool = False
    ) -> Iterator[None]:
        """Enter a context in which one training spends the budget.

        Args:
            args: arguments of the run.
            divides: True if the optimizer is Adam or AdamW; None decides by `args.optim`.
            stability_steps: steps between measurements of the curvature; 0 if there are none.
            searches: True if a learning rate is searched for before the first step.
        """
        self._begin(args, divides, stability_steps, searches)
        try:
            yield
        finally:
            self._zo = self._losses = None

    def resolved(self, args: ZOConfig) -> ZOConfig:
        """Return the arguments, with `max_steps` set to what the forward passes pay for if they alone set the length."""
        if not self._replaces_max_steps:
            return args
        with_steps = copy.copy(args)
        with_steps.max_steps = self.steps()
        return with_steps

    def watch(self, zo: ZerothOrder, ranks: Ranks, losses: Any) -> None:
        """Start to count the forward passes of an engine.

        Args:
            zo: the engine.
            ranks: the processes that train together.
            losses: makes the losses of micro-batches, and has `passes_beside`, see `MicroBatchLosses`.
        """
        self._zo, self._ranks, self._losses = zo, ranks, losses

    def see(self, dataloader: DataLoader) -> None:
        """Note the length of an epoch, whose last step may have fewer micro-batches than the others."""
        self._batches = len(dataloader) if has_length(dataloader) else None

    @property
    def seconds(self) -> float:
        """Time in seconds that the run has taken so far, including the time before a resume."""
        return self.seconds_before + monotonic() - self._began

    def steps(self) -> int:
        """Return the number of steps that the forward passes pay for, without what the first step measures beside its probes."""
        budget = self.args.zo_max_forward_passes
        assert budget is not None
        if self._searches:
            budget -= forward_passes_of_search(int(SHARE * budget), self.args.gradient_accumulation_steps)
        accumulation, every = self.args.gradient_accumulation_steps, self._stability_steps
        ragged = self._batches is not None and self._batches % accumulation
        per_epoch = -(-(self._batches or 0) // accumulation) if ragged else 1
        period = math.lcm(self._settings.rule_kind.period(self._settings), every or 1, per_epoch)
        period = min(period, _LONGEST_PERIOD)
        measured = self._measured_passes()
        costs = [
            (self._passes_per_batch(step) + (measured if every and step % every == 0 else 0))
            * self._next_batches(step)
            for step in range(period)
        ]
        if self._divides:  # every period counts a measurement of its first step, but the run's first step has none
            budget += measured * self._next_batches(0)
        periods, rest = divmod(budget, sum(costs))
        return max(1, periods * period + bisect_right(list(itertools.accumulate(costs)), rest))

    def of_search(self, steps: int) -> int:
        """Return the forward passes that a search for the learning rate of a run of `steps` steps may take."""
        limit, accumulation = self.args.zo_max_forward_passes, self.args.gradient_accumulation_steps
        planned = steps * accumulation * self._passes_per_batch(0)
        if limit is not None:
            planned = limit if self._replaces_max_steps else min(limit, planned)
        return int(SHARE * planned)

    def pays_for(self, batches: int, beside: int = 0) -> bool:
        """Return whether the budget pays for a step of `batches` micro-batches, and for other forward passes beside it."""
        budget = self.args.zo_max_forward_passes
        if budget is None or not batches:
            return True
        return self._spent() + beside + self._cost(batches) <= budget

    def on_train_begin(
        self, args: ZOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Refuse a budget that pays for no step; end a resumed run that has nothing left."""
        batches = self._next_batches(state.global_step)
        pays = self.pays_for(batches)
        if not pays and not state.global_step:
            also = f", {self._passes_of_check()} of them to find out how to evaluate it" if self._checks() else ""
            if self._spent():
                also += f", beside the {self._spent()} of learning_rate='auto'"
            raise ValueError(
                f"zo_max_forward_passes={args.zo_max_forward_passes} is too small for the first step, which "
                f"{'may take' if also else 'takes'} {self._cost(batches)}{also}; raise it."
            )
        # By the checkpoint's time, which is the same on every rank, and not by the clock.
        self.is_spent = not pays or self._reaches_limit(self.seconds_before)
        if self.is_spent and state.global_step < state.max_steps:
            option = "zo_max_time" if pays else "zo_max_forward_passes"
            logger.warning(
                "the run of this checkpoint has ended, so no step is taken: %s is spent; raise it to go on", option
            )
        control.should_training_stop |= self.is_spent
        return control

    def on_step_end(
        self, args: ZOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """End the run if the time is up, or if the budget does not pay for another step."""
        if not self._time_is_up() and self.pays_for(self._next_batches(state.global_step)):
            return None
        self.is_spent = True
        state.max_steps = state.global_step
        return DefaultFlowCallback().on_step_end(args, state, control)

    def _time_is_up(self) -> bool:
        if self.args.zo_max_time is None:
            return False
        # Clocks differ between ranks, and all ranks must stop at the same step.
        verdict = torch.tensor(self._reaches_limit(self.seconds), device=self.args.device)
        self._ranks.broadcast(verdict)
        return bool(verdict)

    def _reaches_limit(self, seconds: float) -> bool:
        return self.args.zo_max_time is not None and seconds >= self.args.zo_max_time

    def _next_batches(self, step: int) -> int:
        """Return the number of micro-batches in the step after `step` steps."""
        accumulation = self.args.gradient_accumulation_steps
        if not self._batches:
            return accumulation
        first = step % -(-self._batches // accumulation) * accumulation
        return min(accumulation, self._batches - first)

    def _cost(self, batches: int) -> int:
        more = self._passes_of_check() if self._checks() else 0
        step, measured = (0, 0) if self._zo is None else (self._zo.step, self._zo.curvature_passes)
        beside = 0 if self._losses is None else self._losses.passes_beside
        return (self._passes_per_batch(step) + measured + beside) * batches + more

    def _passes_per_batch(self, step: int) -> int:
        rule = self._settings.rule_kind
        looks_back = rule.looks_back(step, self._settings)  # steps differ in nothing else
        if looks_back not in self._passes:
            self._passes[looks_back] = forward_passes_of_a_step(self._estimator(), rule, self._settings, step)
        return self._passes[looks_back]

    def _estimator(self) -> Estimator:
        return self._settings.make_estimator(1.0)

    def _checks(self) -> bool:
        """Return whether the next step begins with a look at how its losses can be evaluated."""
        if self._zo is None:
            return False
        if self._zo.private is not None:
            return self._zo.step == 0
        groups = self._zo.row_groups
        if groups is None or groups.comes_apart is False:
            return self._zo.evaluator.batched is None
        return groups.comes_apart is None or groups.looks_again(self._estimator().probes())

    def _passes_of_check(self) -> int:
        """Return the most forward passes that such a look takes."""
        if self._zo is not None and self._zo.private is not None:
            return PASSES_OF_CHECK
        probes = self._estimator().probes()
        groups = None if self._zo is None else self._zo.row_groups
        if groups is None or groups.comes_apart is False:
            return len(probes)
        if groups.comes_apart:
            return len(probes) if groups.looks_again(probes) else 0
        # A loss that turns out not to come apart is evaluated again as a whole, and then perhaps in one forward pass.
        whole = len(probes) * (2 if self._zo is not None and self._zo.evaluator.batched is None else 1)
        return passes_of_check(probes) + passes_of_joined(probes) + whole

    def _spent(self) -> int:
        return 0 if self._zo is None else self._zo.forward_passes

    def _measured_passes(self) -> int:
        """Return the forward passes that a measurement of the curvature adds to a step, for each micro-batch."""
        if not self._stability_steps:
            return 0
        return len(curvature_probes(self._estimator(), self._divides))


class BudgetedTrainer(StreamTrainer):
    """Ends a training when its budget is spent, and lets a run that has ended take no further step."""

    control: TrainerControl
    callback_handler: CallbackHandler
    _budget: Budget

    def _spending(self, searches: bool) -> Any:
        """Return a context in which one training spends the budget."""
        is_adam = divides(self.optimizer and self._torch_optimizer(), self.optimizer_cls_and_kwargs)
        every = 0 if self._stability is None else self._stability.every
        return self._budget.of(self.args, is_adam, every, searches)

    def set_initial_training_values(self, args: ZOConfig, dataloader: DataLoader) -> Any:
        """Return Trainer's values, with as many steps as the forward passes pay for if they alone set the length."""
        self._budget.see(dataloader)
        return super().set_initial_training_values(self._budget.resolved(args), dataloader)

    def _init_training_state(self, max_steps: int, per_epoch: int, epochs: int, *more: Any) -> tuple[int, int]:
        passes, batches = super()._init_training_state(max_steps, per_epoch, epochs, *more)
        if self._resumed_from is None:
            return passes, batches
        # Trainer looks at the number of steps only after a step.
        reason = self._why_finished(max_steps)
        if reason is None:
            return passes, batches
        logger.warning("the run of this checkpoint has ended, so no step is taken: %s", reason)
        return epochs, 0

    def _why_finished(self, max_steps: int) -> str | None:
        return why_finished(self.state, max_steps, self.callback_handler.callbacks)

    def get_batch_samples(self, *args: Any) -> tuple[list, Any]:
        """Return Trainer's micro-batches of a step; none if the budget does not pay for the step."""
        if self._budget.is_spent:
            return [], None
        batches, items = super().get_batch_samples(*args)
        if not self._budget.pays_for(len(batches)):
            self._budget.is_spent = self.control.should_training_stop = True
            return [], None
        return batches, items
