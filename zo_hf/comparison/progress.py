"""The budget of a run: forward passes counted, scores at equal shares of them, and the time between scores."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback


class Progress(TrainerCallback):
    """Counts forward passes, scores the model at equal shares of the budget, and stops before exceeding the budget.

    Args:
        budget: the number of forward passes.
        evaluations: the number of scores in a run, including the one at its end.
        scorer: scores the model in its present state.

    Attributes:
        count: returns the forward passes after a number of steps; to be set before training.
        passes: forward passes so far.
        largest_step: the largest number of forward passes in a step.
        seconds: training time so far, without scoring.
        scores: the scores so far.
    """

    count: Callable[[int], int]

    def __init__(self, budget: int, evaluations: int, scorer: Callable[[], dict[str, float]]) -> None:
        self.budget, self.evaluations, self.scorer = budget, evaluations, scorer
        self.passes = self.largest_step = 0
        self._steps: Counter[int] = Counter()  # by their forward passes
        self.seconds = 0.0
        self.scores: list[dict[str, float]] = []
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        passes = self.count(state.global_step)
        of_step = passes - self.passes
        self._steps[of_step] += 1
        self.largest_step = max(self.largest_step, of_step)
        if passes > self.budget:
            raise ValueError(
                f"a step takes {self.largest_step} forward passes, more than the budget of {self.budget}; increase "
                "the budget."
            )
        self.passes = passes
        is_last = passes + self.largest_step > self.budget
        if is_last or passes * self.evaluations >= (len(self.scores) + 1) * self.budget:
            self.seconds += now() - self._since
            self.score()
            self._since = now()
        control.should_training_stop |= is_last

    @property
    def forwards_per_step(self) -> int:
        """The number of forward passes of most steps; the first one may take more, to see whether rows come apart."""
        return max(self._steps, key=self._steps.__getitem__, default=0)

    def score(self) -> None:
        """Append the model's present score."""
        self.scores.append({"forward_passes": self.passes, "seconds": self.seconds} | self.scorer())


def now() -> float:
    """Return a time in seconds: on a CPU, processor time of this process, which other programs do not affect."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
