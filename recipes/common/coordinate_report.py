"""Table and figures of a comparison of coordinate descent with random directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from common.coordinate_studies import Study

#: Measurements of a run after the one at its start.
POINTS = 20

Curve = Sequence[Sequence[float]]
Run = Mapping[str, Any]


def final(curve: Curve) -> tuple[float, float]:
    """Return the final loss and accuracy; infinity and 0 for a diverged run."""
    done = len(curve) > POINTS and math.isfinite(curve[-1][0])
    return (curve[-1][0], curve[-1][1]) if done else (math.inf, 0.0)


def cell(ends: Sequence[tuple[float, float]]) -> str:
    """Return two table cells: loss and accuracy, mean ± standard deviation over seeds."""
    if not all(math.isfinite(loss) for loss, _ in ends):
        return "diverges | |"
    losses, accuracies = [loss for loss, _ in ends], [100 * accuracy for _, accuracy in ends]
    spreads = [f" ± {stdev(values):.2g}" if len(values) > 1 else "" for values in (losses, accuracies)]
    return f"{mean(losses):.3g}{spreads[0]} | {mean(accuracies):.1f}{spreads[1]} % |"


class Report:
    """Table and figures of finished runs.

    Args:
        study: the network and its methods.
        best: the tuned learning rate of each method.
        runs: returns the finished runs of a method with a learning rate and a distance, one for each seed.
    """

    def __init__(self, study: Study, best: Mapping[str, float], runs: Callable[..., list[dict[str, Any]]]) -> None:
        self._study, self._best, self._runs = study, best, runs

    def table(self) -> str:
        """Return a table with a row for each method, and one with a row for each distance."""
        shared = self._study.shared_rate
        heads = ["method", "tuned α", "seeds", "forward passes", "cycles", "seconds", "loss", "accuracy"]
        heads += [f"loss at α = {shared:g}", f"accuracy at α = {shared:g}"] if shared else []
        lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        for method, rate in self._best.items():
            runs = self._runs(method, rate)
            cycles = f"{_cycles(runs[0], self._study):.2g}" if self._study.methods[method].along_coordinates else ""
            seconds = mean(run["seconds"] for run in runs)
            line = f"| {method} | {rate:g} | {len(runs)} | {runs[0]['forwards']:,} | {cycles} | {seconds:.0f} | "
            line += self._cells(method, rate)
            lines.append(line + (f" {self._cells(method, shared)}" if shared else ""))
        if self._study.ablated is not None and self._study.ablated[0] in self._best:
            method, others = self._study.ablated
            rate, own = self._best[method], self._study.methods[method].eps
            lines += ["", f"| {method}, α = {rate:g} | loss | accuracy |", "|---|---:|---:|"]
            lines += [f"| ε = {eps:g} | {self._cells(method, rate, eps)}" for eps in sorted({own, *others})]
        return "\n".join(lines) + "\n"

    def _cells(self, method: str, rate: float, eps: float | None = None) -> str:
        return cell([final(run["curve"]) for run in self._runs(method, rate, eps)])

    def plot(self, path: Path) -> None:
        """Draw loss and accuracy against forward passes: the mean and the range over seeds."""
        pyplot = _pyplot()
        columns: list[tuple[str, float | None]] = [("each at its own α", None)]
        if self._study.shared_rate:
            columns.append((f"all at α = {self._study.shared_rate:g}", self._study.shared_rate))
        figure, panels = pyplot.subplots(
            2, len(columns), figsize=(5 * len(columns) + 1, 7), sharex=True, sharey="row", squeeze=False
        )
        for column, (title, shared) in enumerate(columns):
            for index, (method, own) in enumerate(self._best.items()):
                self._draw(panels[:, column], method, shared or own, f"C{index}")
            panels[0][column].set_title(title)
            panels[0][column].legend(fontsize="x-small")
            panels[1][column].set_xlabel("forward passes")
        lengths = {self._runs(*pair)[0]["forwards"] for pair in self._best.items()}
        if len(lengths) > 1:
            panels[0][0].set_xscale("log")
        panels[0][0].set(ylabel="training loss", yscale="log")
        panels[0][0].set_ylim(top=min(10, panels[0][0].get_ylim()[1]))
        panels[1][0].set_ylabel("held-out accuracy")
        _save(figure, panels, path)

    def _draw(self, panels: Sequence[Any], method: str, rate: float, color: str) -> None:
        runs = self._runs(method, rate)
        shortest = min(len(run["curve"]) for run in runs)
        forwards = [runs[0]["forwards"] * point / POINTS for point in range(shortest)]
        for row, axes in enumerate(panels):
            over_seeds = list(zip(*([point[row] for point in run["curve"][:shortest]] for run in runs), strict=True))
            axes.plot(forwards, [mean(values) for values in over_seeds], color=color, label=f"{method}, {rate:g}")
            low, high = [min(values) for values in over_seeds], [max(values) for values in over_seeds]
            axes.fill_between(forwards, low, high, color=color, alpha=0.2, linewidth=0)

    def plot_coherence(self, path: Path) -> None:
        """Draw the coherence of every step and its mean over a cycle, of the first seed, against cycles."""
        pyplot = _pyplot()
        remembering = [
            (method, rate, runs[0])
            for method, rate in self._best.items()
            if (runs := self._runs(method, rate)) and runs[0]["coherence"]
        ]
        if not remembering:
            return
        figure, panels = pyplot.subplots(1, 1, figsize=(7, 4), squeeze=False)
        axes = panels[0][0]
        for index, (method, rate, run) in enumerate(remembering):
            per_cycle = run["forwards"] / _cycles(run, self._study)
            cycles = [passes / per_cycle for passes, _ in run["coherence"]]
            values = [value for _, value in run["coherence"]]
            window = max(1, sum(cycle < cycles[0] + 1 for cycle in cycles))
            means = [mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
            axes.plot(cycles, values, ".", markersize=2, alpha=0.3, color=f"C{index}")
            axes.plot(cycles, means, color=f"C{index}", label=f"{method}, α = {rate:g}")
        axes.axhline(0.0, color="gray", linewidth=0.5)
        axes.set(xlabel="cycles", ylabel="coherence", ylim=(-1.05, 1.05))
        axes.legend(fontsize="small")
        _save(figure, panels, path)


def _cycles(run: Run, study: Study) -> float:
    """Return how often every coordinate has had its turn by the end of a run."""
    return run["steps"] * study.methods[run["method"]].options["num_directions"] / run["coordinates"]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, panels: Any, path: Path) -> None:
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
