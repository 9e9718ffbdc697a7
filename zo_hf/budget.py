"""Runs that end when their forward passes or their time are spent, instead of after a number of steps.

What one step costs is known before it: that of its probes, of what its rule evaluates, which need not be the same in every
step, and of what is measured beside them, times micro-batches; and in the first step the probes of one more, where
`zo_batched_probes="auto"` evaluates one both ways. A step that would go beyond the budget is not begun.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import has_length
from transformers.training_args import OptimizerNames

from zo_hf.config import ZOConfig
from zo_hf.distributed import Ranks
from zo_hf.estimators import ESTIMATORS, Estimator
from zo_hf.optimizers import RULES, Rule
from zo_hf.probes.curvature import curvature_probes
from zo_hf.stability.find_learning_rate import SHARE, forward_passes_of_search
from zo_hf.zeroth_order import ZerothOrder, forward_passes_of_a_step

# Whose steps are measured by probes of their own, from the second one on.
ADAM = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)


class Budget(TrainerCallback):
    """Ends a training as `max_steps` would, with the evaluation and the checkpoint that are due then.

    Args:
        args: of the run.

    Attributes:
        is_spent: whether no further step may begin.
        seconds_before: what the run had taken by the checkpoint it was resumed from.
    """

    def __init__(self, args: ZOConfig) -> None:
        self._begin(args)

    def _begin(self, args: ZOConfig, divides: bool | None = None) -> None:
        self.args, self._divides = args, args.optim in ADAM if divides is None else divides
        # Once the rate is found, the arguments hold a number, also where a restart plans anew.
        self._searches = args.learning_rate == "auto"
        self.is_spent = False
        self.seconds_before, self._began = 0.0, monotonic()
        self._zo: ZerothOrder | None = None
        self._ranks = Ranks()
        self._replaces_max_steps = args.zo_max_forward_passes is not None and args.max_steps <= 0
        self._batches: int | None = None

    @contextmanager
    def of(self, args: ZOConfig, divides: bool | None = None) -> Iterator[None]:
        """Inside, one training is under way, and `args.max_steps` follows from the forward passes if it is not given.

        Args:
            divides: whether the optimizer is Adam or AdamW; None: as `args.optim` says.
        """
        self._begin(args, divides)
        given = args.max_steps
        try:
            if self._replaces_max_steps:
                args.max_steps = self.steps()
            yield
        finally:
            if self._replaces_max_steps:
                args.max_steps = given
            self._zo = None

    def watch(self, zo: ZerothOrder, ranks: Ranks) -> None:
        """Spend for this engine's steps."""
        self._zo, self._ranks = zo, ranks

    def see(self, dataloader: DataLoader) -> None:
        """Take an epoch's last step, which may have fewer micro-batches than the others, into account."""
        self._batches = len(dataloader) if has_length(dataloader) else None
        if self._replaces_max_steps:
            self.args.max_steps = self.steps()

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, what it took before it was resumed included."""
        return self.seconds_before + monotonic() - self._began

    def steps(self) -> int:
        """Steps that the forward passes pay for, but for a check of `zo_batched_probes="auto"`."""
        budget = self.args.zo_max_forward_passes
        assert budget is not None
        if self._searches:
            budget -= forward_passes_of_search(int(SHARE * budget), self.args.gradient_accumulation_steps)
        accumulation, every = self.args.gradient_accumulation_steps, self.args.zo_stability_steps
        ragged = self._batches is not None and self._batches % accumulation
        per_epoch = -(-(self._batches or 0) // accumulation) if ragged else 1
        period = math.lcm(self._rule.period(self.args.rule_options()), every or 1, per_epoch)
        measured = self._measured_passes()
        costs = [
            (self._passes_per_batch(step) + (measured if every and step % every == 0 else 0))
            * self._next_batches(step)
            for step in range(period)
        ]
        if self._divides:  # the first step is not measured, while all periods are counted alike
            budget += measured * self._next_batches(0)
        periods, rest = divmod(budget, sum(costs))
        return max(1, periods * period + bisect_right(list(itertools.accumulate(costs)), rest))

    def of_search(self, steps: int) -> int:
        """Forward passes that a search for the learning rate may take, of a run of so many steps."""
        limit, accumulation = self.args.zo_max_forward_passes, self.args.gradient_accumulation_steps
        planned = steps * accumulation * self._passes_per_batch(0)
        if limit is not None:
            planned = limit if self._replaces_max_steps else min(limit, planned)
        return int(SHARE * planned)

    def pays_for(self, batches: int) -> bool:
        """Whether a step of so many micro-batches can be afforded."""
        budget = self.args.zo_max_forward_passes
        if budget is None or not batches:
            return True
        return self._spent() + self._cost(batches) <= budget

    def on_train_begin(
        self, args: ZOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Refuse what pays for no step at all; a run that is resumed with nothing left ends where it is."""
        batches = self._next_batches(state.global_step)
        pays = self.pays_for(batches)
        if not pays and not state.global_step:
            also = ", of which it checks one micro-batch twice" if self._checks() else ""
            if self._spent():
                also += f", beside the {self._spent()} of learning_rate='auto'"
            raise ValueError(
                f"zo_max_forward_passes={args.zo_max_forward_passes} does not pay for the first step, which takes "
                f"{self._cost(batches)}{also}; raise it."
            )
        # The time of the checkpoint, which is the same on every rank, and not the clock's.
        self.is_spent = not pays or self._reaches_limit(self.seconds_before)
        control.should_training_stop |= self.is_spent
        return control

    def on_step_end(
        self, args: ZOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Make the step that ends the run its last one."""
        if not self._time_is_up() and self.pays_for(self._next_batches(state.global_step)):
            return None
        self.is_spent = True
        state.max_steps = state.global_step
        return DefaultFlowCallback().on_step_end(args, state, control)

    def _time_is_up(self) -> bool:
        if self.args.zo_max_time is None:
            return False
        # Clocks differ, and all ranks must stop at the same step.
        verdict = torch.tensor(self._reaches_limit(self.seconds), device=self.args.device)
        self._ranks.take_from_first(verdict)
        return bool(verdict)

    def _reaches_limit(self, seconds: float) -> bool:
        return self.args.zo_max_time is not None and seconds >= self.args.zo_max_time

    def _next_batches(self, step: int) -> int:
        """Micro-batches of the step after `step` steps."""
        accumulation = self.args.gradient_accumulation_steps
        if not self._batches:
            return accumulation
        first = step % -(-self._batches // accumulation) * accumulation
        return min(accumulation, self._batches - first)

    def _cost(self, batches: int) -> int:
        twice = len(self._estimator().probes()) if self._checks() else 0
        step, measured = (0, 0) if self._zo is None else (self._zo.step, self._zo.curvature_passes)
        return (self._passes_per_batch(step) + measured) * batches + twice

    def _passes_per_batch(self, step: int) -> int:
        return forward_passes_of_a_step(self._estimator(), self._rule, self.args.rule_options(), step)

    @property
    def _rule(self) -> type[Rule]:
        return RULES[self.args.zo_rule]

    def _estimator(self) -> Estimator:
        return ESTIMATORS[self.args.zo_estimator](1.0, self.args.zo_num_directions)

    def _checks(self) -> bool:
        return self._zo is not None and self._zo.evaluator.batched is None

    def _spent(self) -> int:
        return 0 if self._zo is None else self._zo.forward_passes

    def _measured_passes(self) -> int:
        """Passes that a step takes beyond its own where it is measured."""
        if not self.args.zo_stability_steps:
            return 0
        return len(curvature_probes(self._estimator(), self._divides))
