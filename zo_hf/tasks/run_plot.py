"""Plots of a run: the loss, and held-out accuracy or loss, against forward passes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot_run(
    log_history: Sequence[Mapping[str, Any]], baselines: Mapping[str, float], final_accuracy: float, path: Path
) -> None:
    """Draw the run and save the plot.

    Args:
        log_history: the trainer's log; entries with `loss` and entries with `eval_accuracy`, each with `step`.
        baselines: accuracies to draw as horizontal lines, by name.
        final_accuracy: accuracy on all held-out sentences after training, drawn as the last point.
        path: the file to write; the suffix selects the format.
    """
    # Imported here, and drawn on a bare Figure, so that no display is needed and no global backend is chosen.
    from matplotlib.figure import Figure

    passes_at = _forward_passes_by_step(log_history)
    losses = [entry for entry in log_history if "loss" in entry]
    accuracies = [entry for entry in log_history if "eval_accuracy" in entry]
    last_step = max((entry["step"] for entry in log_history), default=0)

    figure = Figure(figsize=(7, 6), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(2, 1, sharex=True)
    loss_axes.plot([passes_at(entry["step"]) for entry in losses], [entry["loss"] for entry in losses])
    loss_axes.set_ylabel("training loss")
    accuracy_axes.plot(
        [passes_at(entry["step"]) for entry in accuracies],
        [entry["eval_accuracy"] for entry in accuracies],
        marker=".",
        label="during training (a part of the held-out sentences)",
    )
    accuracy_axes.plot(passes_at(last_step), final_accuracy, "*", markersize=12, label="trained")
    for style, (name, value) in zip(("--", "-.", ":"), baselines.items(), strict=False):
        accuracy_axes.axhline(value, linestyle=style, color="gray", label=f"{name} ({value:.3f})")
    accuracy_axes.set_ylabel("held-out accuracy")
    accuracy_axes.set_xlabel("forward passes")
    accuracy_axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def plot_losses(log_history: Sequence[Mapping[str, Any]], held_out: tuple[float, float] | None, path: Path) -> None:
    """Draw the training loss and the held-out loss of a run, and save the plot.

    Args:
        log_history: the trainer's log; entries with `loss` and entries with `eval_loss`, each with `step`.
        held_out: the loss on held-out rows before and after training; None without such rows.
        path: the file to write; the suffix selects the format.
    """
    from matplotlib.figure import Figure

    passes_at = _forward_passes_by_step(log_history)
    losses = [(passes_at(entry["step"]), entry["loss"]) for entry in log_history if "loss" in entry]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*losses, strict=True) if losses else ([], []), label="training rows")
    if held_out is not None:
        last = passes_at(max((entry["step"] for entry in log_history), default=0))
        between = [(passes_at(entry["step"]), entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
        points = sorted({0.0: held_out[0], **dict(between), last: held_out[1]}.items())
        axes.plot(*zip(*points, strict=True), marker=".", label="held-out rows")
    axes.set_ylabel("loss")
    axes.set_xlabel("forward passes")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _forward_passes_by_step(log_history: Sequence[Mapping[str, Any]]) -> Any:
    """Return a function from a step to its number of forward passes, linear between the steps that log it."""
    counted = [(entry["step"], entry["zo/forward_passes"]) for entry in log_history if "zo/forward_passes" in entry]
    steps, passes = zip((0, 0), *counted, strict=True)
    return lambda step: float(np.interp(step, steps, passes))
