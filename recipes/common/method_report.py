"""The report of a comparison of methods: a table of final scores, and curves against forward passes and time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zo_hf.comparison.methods import REFERENCE
from zo_hf.comparison.passes import passes_to_end_of
from zo_hf.comparison.result import Result, draw_curve, spread


def table(results: Mapping[str, Result], zero_shot: Mapping[str, Any]) -> str:
    """Return a Markdown table with a row for each method, after the untrained model and the most frequent answer."""
    reference = results.get(REFERENCE)
    start = zero_shot["scores"][-1]
    lines = [
        "| method | forwards / step | learning rate | loss | accuracy | calibrated | MeZO's loss after | MeZO's accuracy after "
        "| time / forward | MiB | rates tried: development loss |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
        f"| zero-shot | | | {start['loss']:.3f} | {start['accuracy']:.3f} | {start['calibrated_accuracy']:.3f} | | | "
        f"| {zero_shot['peak_mib']:.0f} | |",
        f"| majority | | | | {zero_shot['majority_accuracy']:.3f} | | | | | | |",
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
            budget = reference.over_seeds("forward_passes")[:, -1].mean()
            passes = [passes_to_end_of(reference, result, start, key) for key in ("loss", "accuracy")]
            cells += ["-" if needed is None else f"{needed / budget:.0%}" for needed in passes]
            cells.append(f"{result.seconds_per_forward() / reference.seconds_per_forward():.2f}")
        cells += [f"{result.peak_mib():.0f}", result.rates_tried()]
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
