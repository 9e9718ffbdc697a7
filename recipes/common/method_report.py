"""The report of a comparison of methods: a table of final scores, and curves against forward passes and time.

A method's curve is the mean over its seeds, smoothed by a running mean of three scores. Its share of plain MeZO's
budget is read where this curve first reaches the end of MeZO's curve, with linear interpolation between scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zo_hf.comparison.methods import REFERENCE
from zo_hf.comparison.result import Result, draw_curve, spread

LOWER_IS_BETTER = {"loss": True, "accuracy": False, "calibrated_accuracy": False}


def smoothed_mean(values: np.ndarray) -> np.ndarray:
    """Average (seeds, evaluations) over seeds, then over each evaluation and its neighbors; return (evaluations,)."""
    average = values.mean(axis=0)
    return np.array([average[max(i - 1, 0) : i + 2].mean() for i in range(len(average))])


def share_of_budget(result: Result, reference: Result, start: Mapping[str, float], key: str) -> float | None:
    """Return the fraction of the reference's forward passes that a method needs to be as good as its end.

    Args:
        result: the method's runs.
        reference: the reference's runs.
        start: scores before any training.
        key: the score to compare.

    Returns:
        None if the method never is as good, or if the reference's end is no better than the start.
    """
    sign = 1.0 if LOWER_IS_BETTER[key] else -1.0
    target = sign * smoothed_mean(reference.over_seeds(key))[-1]
    curve = sign * np.array([start[key], *smoothed_mean(result.over_seeds(key))])
    passes = np.array([0.0, *result.over_seeds("forward_passes").mean(axis=0)])
    budget = reference.over_seeds("forward_passes")[:, -1].mean()
    reached = np.flatnonzero(curve <= target)
    if not len(reached) or not target < curve[0]:
        return None
    at = int(reached[0])
    part = (curve[at - 1] - target) / (curve[at - 1] - curve[at])
    return float((passes[at - 1] + part * (passes[at] - passes[at - 1])) / budget)


def table(results: Mapping[str, Result], zero_shot: Mapping[str, Any]) -> str:
    """Return a Markdown table with a row for each method, after the untrained model and the most frequent answer."""
    reference = results.get(REFERENCE)
    start = zero_shot["scores"][-1]
    lines = [
        "| method | forwards / step | learning rate | loss | accuracy | calibrated | MeZO's loss after | MeZO's accuracy after "
        "| time / forward | MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| zero-shot | | | {start['loss']:.3f} | {start['accuracy']:.3f} | {start['calibrated_accuracy']:.3f} | | | "
        f"| {zero_shot['peak_mib']:.0f} |",
        f"| majority | | | | {zero_shot['majority_accuracy']:.3f} | | | | | |",
    ]
    for name, result in results.items():
        cells = [
            name,
            str(max(run["forwards_per_step"] for run in result.runs)),
            f"{result.learning_rate:.2g}" + (" (edge)" if result.at_edge else ""),
            *(spread(result.finals(key)) for key in ("loss", "accuracy", "calibrated_accuracy")),
        ]
        if reference is None:
            cells += ["-", "-", "-"]
        else:
            cells += [_percent(share_of_budget(result, reference, start, key)) for key in ("loss", "accuracy")]
            cells.append(f"{result.seconds_per_forward() / reference.seconds_per_forward():.2f}")
        cells.append(f"{result.peak_mib():.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Result], zero_shot: Mapping[str, Any], against: str, path: Path) -> None:
    """Draw test loss and accuracy of every group together with the reference, and save the figure.

    Args:
        results: the methods' runs.
        zero_shot: the evaluation of the untrained model.
        against: the horizontal axis, "forward_passes" or "seconds".
        path: the file to write.
    """
    # Imported here, and drawn on a bare Figure, so that no display is needed and no global backend is chosen.
    from matplotlib.figure import Figure

    start = zero_shot["scores"][-1]
    groups = list(dict.fromkeys(result.group for result in results.values()))
    columns = min(len(groups), 3)
    blocks = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(4.6 * columns, 5.6 * blocks), layout="constrained")
    panels = figure.subplots(2 * blocks, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for index, group in enumerate(groups):
        row, column = 2 * (index // columns), index % columns
        for axes, key in zip(panels[row : row + 2, column], ("loss", "accuracy"), strict=True):
            axes.set_axis_on()
            drawn = {name: result for name, result in results.items() if result.group == group and name != REFERENCE}
            for color, (name, result) in enumerate(drawn.items()):
                draw_curve(axes, result, start, against, key, f"C{color}", name)
            if REFERENCE in results:
                draw_curve(axes, results[REFERENCE], start, against, key, "black", REFERENCE)
            axes.axhline(start[key], linestyle="--", linewidth=0.8, color="gray")
            axes.grid(alpha=0.3)
        loss_axes, accuracy_axes = panels[row : row + 2, column]
        accuracy_axes.axhline(zero_shot["majority_accuracy"], linestyle=":", linewidth=0.8, color="gray")
        # The limit keeps a diverged method from squeezing all others.
        loss_axes.set_ylim(top=min(loss_axes.get_ylim()[1], 1.25 * start["loss"]))
        loss_axes.set_title(group)
        loss_axes.set_ylabel("test loss")
        loss_axes.legend(fontsize="x-small", loc="upper right")
        accuracy_axes.set_ylabel("test accuracy")
        accuracy_axes.set_xlabel("forward passes" if against == "forward_passes" else "seconds of training")
    figure.savefig(path, dpi=130)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
