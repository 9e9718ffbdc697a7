"""The report of a suite: tables of all problems with controls and verdicts, a table of each problem, and figures.

Figures show the mean over seeds and a band of one standard deviation, against forward passes, training time and peak memory,
with the untrained model (dashed) and the best constant answer (dotted).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from zo_hf.comparison.job import Problem, titles
from zo_hf.comparison.methods import FIRST_ORDER, FORWARD_GRADIENT, ONE_DIRECTION
from zo_hf.comparison.passes import passes_table
from zo_hf.comparison.result import Result, draw_curve, spread
from zo_hf.comparison.verdict import verdict

#: Figures: file name, score, and what it is drawn against.
FIGURES = (
    ("accuracy-passes.png", "accuracy", "forward_passes"),
    ("loss-passes.png", "loss", "forward_passes"),
    ("accuracy-time.png", "accuracy", "seconds"),
    ("accuracy-memory.png", "accuracy", "peak_mib"),
)
_AXES = {
    "forward_passes": "forward passes",
    "seconds": "seconds of training",
    "peak_mib": "peak memory, MiB",
}
_COLUMNS = 4


@dataclass(frozen=True)
class ProblemReport:
    """The finished runs of one problem.

    Attributes:
        problem: the problem.
        results: results by method.
        zero_shot: evaluations of the untrained model, one for each draw of fresh weights.
        failed: errors by method.
    """

    problem: Problem
    results: Mapping[str, Result]
    zero_shot: Sequence[Mapping[str, Any]]
    failed: Mapping[str, str]

    def untrained(self, key: str) -> list[float]:
        """Return a score of the untrained model for each draw of its fresh weights."""
        return [float(run["scores"][-1][key]) for run in self.zero_shot]

    def constant(self, key: str) -> float:
        """Return the accuracy of the most frequent answer, or the loss of answering with the labels' frequencies."""
        return float(self.zero_shot[0]["majority_accuracy" if key == "accuracy" else "constant_loss"])

    def verdict(self, key: str) -> str:
        """Return the verdict on `low_rank`, or "-" if one of the three methods that it needs has no result."""
        if not {FIRST_ORDER, FORWARD_GRADIENT, ONE_DIRECTION} <= self.results.keys():
            return "-"
        sign = 1.0 if key == "accuracy" else -1.0
        control = max(sign * mean(self.untrained(key)), sign * self.constant(key))
        scores = [
            [sign * value for value in self.results[name].finals(key)]
            for name in (FIRST_ORDER, FORWARD_GRADIENT, ONE_DIRECTION)
        ]
        return verdict(control, *scores)


def summary(reports: Sequence[ProblemReport], key: str) -> str:
    """Return a Markdown table of a score with a row for each problem, controls first and the verdict last.

    Args:
        reports: the problems.
        key: the score, "accuracy" or "loss".
    """
    methods = list(dict.fromkeys(name for report in reports for name in report.results))
    lines = [
        f"| test {key} | majority | untrained | {' | '.join(methods)} | verdict |",
        f"|---|{'---:|' * (2 + len(methods))}---|",
    ]
    for title, report in _titled(reports):
        cells = [title, f"{report.constant(key):.3f}", spread(report.untrained(key))]
        for name in methods:
            result = report.results.get(name)
            cells.append("-" if result is None else spread(result.finals(key)) + " (edge)" * result.at_edge)
        lines.append(f"| {' | '.join([*cells, report.verdict(key)])} |")
    return "\n".join(lines) + "\n"


def edges(reports: Sequence[ProblemReport]) -> str:
    """Return a sentence that says how many learning rates are at an end of those tried."""
    found = [result.at_edge for report in reports for result in report.results.values()]
    return f"Of {len(found)} learning rates, {sum(found)} are the largest or the smallest tried (edge): a better one may lie beyond."


def details(report: ProblemReport) -> str:
    """Return a Markdown table of one problem with a row for each control and method."""
    fastest = min(result.seconds_per_forward() for result in report.results.values())
    lines = [
        "| method | forwards / step | learning rate | test loss | test accuracy | time / forward | MiB | rates tried: development loss |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
        f"| majority | | | {report.constant('loss'):.3f} | {report.constant('accuracy'):.3f} | | | |",
        f"| untrained | | | {spread(report.untrained('loss'))} | {spread(report.untrained('accuracy'))} | | | |",
    ]
    for name, result in report.results.items():
        cells = [
            name,
            str(max(run["forwards_per_step"] for run in result.runs)),
            f"{result.learning_rate:.2g}" + (" (edge)" if result.at_edge else ""),
            spread(result.finals("loss")),
            spread(result.finals("accuracy")),
            f"{result.seconds_per_forward() / fastest:.2f}",
            f"{result.peak_mib():.0f}",
            result.rates_tried(),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"\nfailed: {name}: {reason}" for name, reason in report.failed.items())]) + "\n"


def page(reports: Sequence[ProblemReport], heading: str, passes_to: Sequence[str] = ()) -> str:
    """Return the whole report in Markdown.

    Args:
        reports: the problems.
        heading: a sentence that says how the runs were made.
        passes_to: names of methods; every problem then has a table of the forward passes to their final losses.
    """
    parts = [heading, summary(reports, "accuracy"), summary(reports, "loss"), edges(reports)]
    for title, report in _titled(reports):
        parts.append(f"### {title}\n\n{details(report)}")
        parts.append(passes_table(report.results, {"loss": mean(report.untrained("loss"))}, passes_to))
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def plot(reports: Sequence[ProblemReport], key: str, against: str, path: Path) -> None:
    """Draw a panel for each problem, and save the figure.

    Args:
        reports: the problems.
        key: the score, "accuracy" or "loss".
        against: "forward_passes", "seconds" or "peak_mib".
        path: the file to write.
    """
    # Imported here, and drawn on a bare Figure, so that no display is needed and no global backend is chosen.
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(name for report in reports for name in report.results))
    color_of = {name: f"C{index}" for index, name in enumerate(methods)}
    columns = min(len(reports), _COLUMNS)
    rows = math.ceil(len(reports) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(reports) :]:
        axes.set_axis_off()
    for axes, (title, report) in zip(panels.flat, _titled(reports), strict=False):
        start = {key: mean(report.untrained(key))}
        for name, result in report.results.items():
            if against == "peak_mib":
                finals = result.finals(key)
                axes.scatter([result.peak_mib()] * len(finals), finals, color=color_of[name], label=name, alpha=0.7)
            else:
                draw_curve(axes, result, start, against, key, color_of[name], name)
        axes.axhline(start[key], linestyle="--", linewidth=0.8, color="gray")
        axes.axhline(report.constant(key), linestyle=":", linewidth=0.8, color="gray")
        if key == "loss":  # the limit keeps a diverged method from squeezing all others
            axes.set_ylim(top=min(axes.get_ylim()[1], 1.25 * max(start[key], report.constant(key))))
        axes.set_title(title, fontsize="small")
        axes.set_xlabel(_AXES[against], fontsize="small")
        axes.set_ylabel(f"test {key}", fontsize="small")
        axes.grid(alpha=0.3)
    handles = {
        label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize="small")
    figure.savefig(path, dpi=110)


def _titled(reports: Sequence[ProblemReport]) -> list[tuple[str, ProblemReport]]:
    return list(zip(titles([report.problem for report in reports]), reports, strict=True))
