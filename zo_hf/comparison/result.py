"""The full runs of one method on one problem, and numbers over their seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np

from zo_hf.comparison.tuning import best_rate, is_at_edge


@dataclass(frozen=True)
class Result:
    """All full runs of one method.

    Attributes:
        group: the panel of figures in which the method is drawn.
        trials: the development loss of each learning rate that was tried, the mean over the seeds of trials.
        runs: one run for each seed, as `zo_hf.comparison.run.run` returns them.
    """

    group: str
    trials: Mapping[float, float]
    runs: Sequence[Mapping[str, Any]]

    @property
    def learning_rate(self) -> float:
        """The learning rate with the least development loss."""
        return best_rate(self.trials)

    @property
    def at_edge(self) -> bool:
        """True if that is the largest or the smallest rate tried."""
        return is_at_edge(self.trials)

    def rates_tried(self) -> str:
        """Return every learning rate that was tried, and its development loss."""
        return ", ".join(f"{rate:.2g}: {loss:.3g}" for rate, loss in sorted(self.trials.items()))

    def over_seeds(self, key: str) -> np.ndarray:
        """Return a score of all runs, (seeds, evaluations)."""
        return np.array([[score[key] for score in run["scores"]] for run in self.runs], dtype=float)

    def finals(self, key: str) -> list[float]:
        """Return a score at the end of each run."""
        return [float(value) for value in self.over_seeds(key)[:, -1]]

    def seconds_per_forward(self) -> float:
        """Return the mean training time per forward pass, in seconds."""
        return mean(run["seconds"] / run["forward_passes"] for run in self.runs)

    def peak_mib(self) -> float:
        """Return the peak memory of a run, in MiB: the least, because a process loads libraries in its first one."""
        return min(float(run["peak_mib"]) for run in self.runs)


def spread(values: Sequence[float]) -> str:
    """Return the mean, and with several values ± their standard deviation."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def draw_curve(
    axes: Any, result: Result, start: Mapping[str, float], against: str, key: str, color: str, label: str
) -> None:
    """Draw the mean over seeds, from the start, and a band of one standard deviation on each side.

    Args:
        axes: matplotlib's axes.
        result: the runs.
        start: scores before training.
        against: the horizontal axis, "forward_passes" or "seconds".
        key: the score to draw.
        color: a color of matplotlib.
        label: the name in the legend.
    """
    values = np.pad(result.over_seeds(key), ((0, 0), (1, 0)), constant_values=start[key])
    x = [0.0, *result.over_seeds(against).mean(axis=0)]
    middle = values.mean(axis=0)
    axes.plot(x, middle, color=color, label=label, linewidth=1.4)
    if len(values) > 1:
        width = values.std(axis=0, ddof=1)
        axes.fill_between(x, middle - width, middle + width, color=color, alpha=0.15, linewidth=0)
