"""Forward passes until a method is as good as another one is at its end.

A method's curve is the mean over its seeds, smoothed by a running mean of three scores. The passes are read where this
curve first reaches the end of the other one, with linear interpolation between scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from zo_hf.comparison.result import Result

LOWER_IS_BETTER = {"loss": True, "accuracy": False, "calibrated_accuracy": False}


def smoothed_mean(values: np.ndarray) -> np.ndarray:
    """Average (seeds, evaluations) over seeds, then over each evaluation and its neighbors; return (evaluations,)."""
    average = values.mean(axis=0)
    return np.array([average[max(i - 1, 0) : i + 2].mean() for i in range(len(average))])


def passes_to_end_of(target: Result, result: Result, start: Mapping[str, float], key: str) -> float | None:
    """Return the forward passes after which a method is as good as another one at its end.

    Args:
        target: the other method's runs.
        result: the method's runs.
        start: scores before any training.
        key: the score to compare.

    Returns:
        None if the method never is as good, or if the end of the other one is no better than the start.
    """
    sign = 1.0 if LOWER_IS_BETTER[key] else -1.0
    end = sign * smoothed_mean(target.over_seeds(key))[-1]
    curve = sign * np.array([start[key], *smoothed_mean(result.over_seeds(key))])
    passes = np.array([0.0, *result.over_seeds("forward_passes").mean(axis=0)])
    reached = np.flatnonzero(curve <= end)
    if not len(reached) or not end < curve[0]:
        return None
    at = int(reached[0])
    # A run may come back from a loss that was not finite.
    part = (curve[at - 1] - end) / (curve[at - 1] - curve[at]) if np.isfinite(curve[at - 1]) else 1.0
    return float(passes[at - 1] + part * (passes[at] - passes[at - 1]))


def passes_table(results: Mapping[str, Result], start: Mapping[str, float], targets: Sequence[str]) -> str:
    """Return a Markdown table of the forward passes that each method takes to the final loss of some of them.

    Args:
        results: results by method.
        start: scores before any training.
        targets: names of the methods whose final loss is asked for; those without a result are left out.

    Returns:
        The table; the empty string if no target has a result.
    """
    targets = [name for name in dict.fromkeys(targets) if name in results]
    if not targets:
        return ""
    lines = [
        f"| forward passes to the final loss of | {' | '.join(targets)} |",
        f"|---|{'---:|' * len(targets)}",
        f"| this loss | {' | '.join(f'{_final_loss(results[name]):.3f}' for name in targets)} |",
    ]
    for name, result in results.items():
        found = [passes_to_end_of(results[target], result, start, "loss") for target in targets]
        lines.append(f"| {name} | {' | '.join('-' if passes is None else f'{passes:.0f}' for passes in found)} |")
    return "\n".join(lines) + "\n"


def _final_loss(result: Result) -> float:
    return float(smoothed_mean(result.over_seeds("loss"))[-1])
