"""A watch over the losses of a run: it tells when a learning rate is too large, from the losses of the run's own steps.

Probes before training describe the loss where the run begins. The loss of a network that learns becomes several times as
curved within a few steps, and then a rate that was sound makes the loss rise. The losses of the steps show that, and cost
nothing. The watch compares means over short windows with the lowest mean so far:

    mean of the last w losses  >  level + max(a·|first|, 4.5·s·(√(1/w) + √(1/v))),     level: the lowest mean of v losses

where v is w, and at least 10. s is the standard deviation of a loss from step to step, mostly the difference between
batches. It is taken where the mean was lowest, because losses that diverge also differ more. A short window w has a large a,
so that a loss that explodes is seen after one step.

After a rise above the first loss, the watch tells of it again every `MEMORY` steps, until the mean falls.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

#: The number of steps whose mean loss is compared with the lowest mean.
WINDOW = 10
#: Windows in steps, and the smallest rise of the mean over each that counts, as a fraction of the first loss.
RISES = ((1, 1.0), (3, 0.25), (WINDOW, 0.1), (3 * WINDOW, 0.1))
#: A mean over a window must exceed the lowest mean by this number of standard errors of both. It is large because every
#: step is another chance of error, and because the lowest of many means is a low one.
ERRORS = 4.5
#: The rise of a long window's mean that counts, as a fraction of how far the loss has fallen; of a short one it is 1.
LOST = 0.4
#: After a rise, the fraction of what the loss is above the first loss that `MEMORY` steps must take back.
RECOVERED = 0.15
#: The number of steps from which the standard deviation is taken.
MEMORY = 3 * WINDOW


class LossWatch:
    """Follows the losses of a run, and tells when they rise.

    Args:
        first: the loss before training; None takes the mean of the first `WINDOW` losses.
        deviation: the standard deviation of a loss from batch to batch, at the beginning.

    Attributes:
        first: the loss before training; None if it is not known yet.
        level: the lowest mean of `WINDOW` losses since the beginning, or since the last time that the losses rose.
    """

    def __init__(self, first: float | None = None, deviation: float = 0.0) -> None:
        self.first, self.level, self._deviation = first, first, deviation
        self._long_level = first
        self._losses: list[float] = []
        self._since = self._seen = 0
        self._risen: float | None = None

    def rises(self, loss: float) -> float | None:
        """Take the loss of a step.

        Returns:
            The mean loss that is too high; None if it is not. After a rise, losses are compared with that mean. Losses that
            do not fall after a rise above the first loss are told of again.
        """
        if not math.isfinite(loss):
            return None  # the step is skipped
        self._losses = [*self._losses, loss][-MEMORY:]
        self._since += 1
        self._seen += 1
        if self.first is None or self.level is None or self._long_level is None:
            if self._since == WINDOW:
                self.first = self.level = self._long_level = self._mean(WINDOW)
                self._deviation = self._deviation_now()
            return None
        mean = self._mean_above_level(self.first, self.level, self._long_level)
        if mean is None:
            self._lower_levels(self.first, self.level, self._long_level)
            mean = self._mean_not_taken_back(self.first)
        return None if mean is None else self._rise(mean)

    def _mean_above_level(self, first: float, level: float, long_level: float) -> float | None:
        """Return the mean over the shortest window in which the losses have risen; None if they have in none."""
        for window, rise in RISES:
            if self._since < window:
                return None
            mean, lowest = self._mean(window), long_level if window > WINDOW else level
            fallen = max(first - lowest, 0.0)
            least = max(rise * abs(first), LOST * fallen if window >= WINDOW else fallen)
            errors = window**-0.5 + max(window, WINDOW) ** -0.5
            if mean - lowest > max(least, ERRORS * self._deviation * errors):
                return mean
        return None

    def _lower_levels(self, first: float, level: float, long_level: float) -> None:
        """Take note of the means that are the lowest so far."""
        if self._since < WINDOW:
            return
        mean, has_never_risen = self._mean(WINDOW), self._seen == self._since
        if has_never_risen and self._since == WINDOW:  # the search saw a few batches: its mean and deviation are rough
            self.first, level, self._long_level = max(first, mean), mean, mean
        if mean <= level:
            self.level = mean
            self._deviation = max(self._deviation, self._deviation_now())
        if self._since >= MEMORY:
            long_mean = self._mean(MEMORY)
            self._long_level = long_mean if has_never_risen and self._since == MEMORY else min(long_level, long_mean)

    def _mean_not_taken_back(self, first: float) -> float | None:
        """Return the mean of `MEMORY` steps if it is about as high as it was after a rise; None if it has fallen."""
        if self._risen is None or self._since % MEMORY:
            return None
        mean = self._mean(MEMORY)
        noise = ERRORS * self._deviation * (MEMORY**-0.5 + WINDOW**-0.5)
        if mean <= first + max(RISES[-1][1] * abs(first), noise):
            self._risen = None
        elif mean > self._risen - RECOVERED * (self._risen - first):
            return mean
        else:
            self._risen = mean
        return None

    def _rise(self, mean: float) -> float:
        assert self.first is not None
        self.level, self._long_level, self._since = mean, mean, 0
        self._risen = mean if mean > self.first else None
        return mean

    def _mean(self, window: int) -> float:
        return sum(self._losses[-window:]) / window

    def _deviation_now(self) -> float:
        """Return the standard deviation of a loss; a median, which the first steps of an explosion do not move."""
        changes = [abs(b - a) for a, b in zip(self._losses[:-1], self._losses[1:], strict=True)]
        # The median of |x - y| of two normal numbers is 0.954 standard deviations.
        return statistics.median(changes) / 0.954

    def state(self) -> dict[str, Any]:
        """Return the state as plain numbers, for a checkpoint."""
        return {
            "first": self.first,
            "level": self.level,
            "long_level": self._long_level,
            "deviation": self._deviation,
            "losses": list(self._losses),
            "since": self._since,
            "seen": self._seen,
            "risen": self._risen,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LossWatch:
        """Return a watch with the state that `state` returned."""
        watch = cls(state["first"], state["deviation"])
        watch.level, watch._long_level = state["level"], state["long_level"]
        watch._losses, watch._since = list(state["losses"]), state["since"]
        watch._seen, watch._risen = state["seen"], state["risen"]
        return watch
