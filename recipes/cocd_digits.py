# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[plot]", "scikit-learn>=1.4"]
# ///
"""Compare coherent coordinate descent with methods without its memory, on scikit-learn's digits.

    python recipes/cocd_digits.py                          # a network of 4,810 weights; ten minutes of one core
    python recipes/cocd_digits.py --processes 1 --forwards 40000 --seeds 0

First, every method makes a full run with each learning rate on the first seed, since a rate that is the best for a
third of a run may diverge later. The rate with the lowest training loss then trains with every seed. So does the rate
that all methods share, as in the paper (arXiv 2605.14373). The results in OUTPUT are runs.jsonl, from which an
interrupted comparison continues, table.md and digits.png.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from zo_hf import ZerothOrder
from zo_hf.comparison.finished_runs import FinishedRuns, finished_runs_are_kept
from zo_hf.subspaces import FullInMemory
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.refusals import refusals_end_the_command

SETTINGS = ("method", "learning_rate", "eps", "seed", "forwards")
COCD: dict[str, Any] = {"estimator": "coordinate", "rule": "cocd", "num_directions": 64}
# Arguments of the engine.
METHODS: dict[str, dict[str, Any]] = {
    "two-point": {"estimator": "two_point", "num_directions": 16, "direction": "rademacher"},
    "BCCD (γ = 0)": COCD | {"rule": "none"},
    "CoCD γ = 0.9": COCD | {"cocd_decay": 0.9},
    "CoCD γ = 0.99": COCD | {"cocd_decay": 0.99},
    "CoCD γ = 1": COCD | {"cocd_decay": 1.0},
    "CoCD γ = 0.99, forward": COCD | {"cocd_decay": 0.99, "estimator": "coordinate_forward"},
}
ABLATED = "CoCD γ = 0.99"
POINTS = 20


def arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--forwards", type=int, default=100_000, help="forward passes of a run (%(default)s)")
    rates = [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3]
    add("--learning-rates", type=float, nargs="+", default=rates, help="learning rates to try (%(default)s)")
    add("--shared-rate", type=float, default=0.01, help="the rate shared by all methods (%(default)s: the paper's)")
    add("--eps", type=float, default=0.1, help="distance of a probe (%(default)s: the paper's)")
    add("--other-eps", type=float, nargs="*", default=[0.01, 1.0], help=f"other distances for {ABLATED} (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs (%(default)s)")
    add("--processes", type=int, default=os.cpu_count(), help="parallel runs (%(default)s: one for each core)")
    add("--output", type=Path, default=Path("out/cocd_digits"), help="folder for results (%(default)s)")
    return parser.parse_args()


class Digits:
    """1,437 training pictures of 8 x 8 pixels and 360 held-out ones, the same for all runs."""

    def __init__(self) -> None:
        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
        pictures = torch.tensor(data.data, dtype=torch.float32)[order] / 16
        labels = torch.tensor(data.target)[order]
        self.train = pictures[:1437], labels[:1437]
        self.held_out = pictures[1437:], labels[1437:]

    def batches(self, seed: int, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches without end, with a new order in every epoch."""
        generator = torch.Generator().manual_seed(seed)
        pictures, labels = self.train
        while True:
            for rows in torch.randperm(len(labels), generator=generator).split(size):
                if len(rows) == size:
                    yield pictures[rows], labels[rows]


class BatchLoss:
    """The loss of one batch, for one probe or for several in one forward pass.

    Args:
        model: the classifier.
        pictures: (rows, 64).
        labels: (rows,).
    """

    def __init__(self, model: nn.Module, pictures: Tensor, labels: Tensor) -> None:
        self.model, self.pictures, self.labels, self.rows = model, pictures, labels, len(labels)

    def __call__(self) -> Tensor:
        return F.cross_entropy(self.model(self.pictures), self.labels)

    def batched(self, copies: int) -> Tensor:
        """Return the losses of `copies` probes, (copies,), from one forward pass."""
        logits = self.model(self.pictures.repeat(copies, 1))
        return F.cross_entropy(logits, self.labels.repeat(copies), reduction="none").view(copies, -1).mean(1)


def train(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make one run, and measure the loss on all training pictures and the held-out accuracy during it."""
    torch.set_num_threads(1)
    torch.manual_seed(settings["seed"])
    digits, model = Digits(), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    subspace = FullInMemory(model, seed=settings["seed"])
    options = {"eps": settings["eps"], "seed": settings["seed"], "batched_probes": True} | METHODS[settings["method"]]
    zo = ZerothOrder(model, subspace, **options)
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=settings["learning_rate"]))
    started, curve = time.process_time(), [measure(model, digits)]
    every = settings["forwards"] / POINTS
    for pictures, labels in digits.batches(settings["seed"]):
        zo.estimate(BatchLoss(model, pictures, labels))
        optimizer.step()
        if zo.forward_passes >= every * len(curve):
            point = measure(model, digits)
            while zo.forward_passes >= every * len(curve):  # a step may take more passes than lie between two points
                curve.append(point)
            del curve[POINTS + 1 :]
            if not point[0] < 10 * curve[0][0] or len(curve) > POINTS:
                break
    return dict(settings) | {"curve": curve, "steps": zo.step, "seconds": time.process_time() - started}


@torch.no_grad()
def measure(model: nn.Module, digits: Digits) -> tuple[float, float]:
    """Return the loss on the training pictures, and the accuracy on the held-out ones."""
    pictures, labels = digits.held_out
    loss = float(F.cross_entropy(model(digits.train[0]), digits.train[1]))
    return loss, float((model(pictures).argmax(1) == labels).float().mean())


class Comparison:
    """The requested runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.finished = FinishedRuns(args.output / "runs.jsonl", SETTINGS)

    def settings(self, method: str, learning_rate: float, seed: int, eps: float | None = None) -> dict[str, Any]:
        """Return the settings that identify a run."""
        values = (method, learning_rate, eps or self.args.eps, seed, self.args.forwards)
        return dict(zip(SETTINGS, values, strict=True))

    def make(self, runs: list[dict[str, Any]]) -> None:
        """Make the missing runs, several in parallel."""
        missing = {tuple(run.values()): run for run in runs if self.finished.find(run) is None}
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.args.processes, mp_context=spawn) as pool:
            jobs = [pool.submit(train, run) for run in missing.values()]
            for job in tqdm(as_completed(jobs), total=len(jobs), unit="run"):
                self.finished.add(job.result())

    def curves(self, method: str, learning_rate: float, eps: float | None = None) -> list[list[tuple[float, float]]]:
        """Return the curve of every seed."""
        runs = [self.finished.find(self.settings(method, learning_rate, seed, eps)) for seed in self.args.seeds]
        return [run["curve"] for run in runs if run is not None]

    def tune(self) -> dict[str, float]:
        """Return the learning rate of each method for which the first seed ends at the lowest loss."""
        rates, first = self.args.learning_rates, self.args.seeds[0]
        self.make([self.settings(method, rate, first) for method in METHODS for rate in rates])

        def end(method: str, rate: float) -> float:
            run = self.finished.find(self.settings(method, rate, first))
            assert run is not None
            return final(run["curve"])[0]

        return {method: min(rates, key=lambda rate: end(method, rate)) for method in METHODS}


def final(curve: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the final loss and accuracy; infinity and 0 for a diverged run."""
    done = len(curve) > POINTS and math.isfinite(curve[-1][0])
    return (curve[-1][0], curve[-1][1]) if done else (math.inf, 0.0)


def cell(curves: list[list[tuple[float, float]]]) -> str:
    """Return two table cells: loss and accuracy, mean ± standard deviation over seeds."""
    ends = [final(curve) for curve in curves]
    if not all(math.isfinite(loss) for loss, _ in ends):
        return "diverges | |"
    losses, accuracies = [loss for loss, _ in ends], [100 * accuracy for _, accuracy in ends]
    spreads = [f" ± {stdev(values):.2g}" if len(values) > 1 else "" for values in (losses, accuracies)]
    return f"{mean(losses):.3g}{spreads[0]} | {mean(accuracies):.1f}{spreads[1]} % |"


def table(comparison: Comparison, best: dict[str, float]) -> str:
    """Return a table with a row for each method, and one with a row for each distance."""
    args, shared = comparison.args, comparison.args.shared_rate
    lines = [
        f"| method | tuned α | loss | accuracy | loss at α = {shared:g} | accuracy at α = {shared:g} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method, rate in best.items():
        tuned, at_shared = comparison.curves(method, rate), comparison.curves(method, shared)
        lines.append(f"| {method} | {rate:g} | {cell(tuned)} {cell(at_shared)}")
    lines += ["", f"| {ABLATED}, α = {best[ABLATED]:g} | loss | accuracy |", "|---|---:|---:|"]
    for eps in sorted({args.eps, *args.other_eps}):
        lines.append(f"| ε = {eps:g} | {cell(comparison.curves(ABLATED, best[ABLATED], eps))}")
    return "\n".join(lines) + "\n"


def plot(comparison: Comparison, best: dict[str, float], path: Path) -> None:
    """Draw loss and accuracy against forward passes: the mean and the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    args = comparison.args
    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7), sharex=True, sharey="row")
    forwards = [args.forwards * point / POINTS for point in range(POINTS + 1)]
    for column, title in enumerate(("each at its own α", f"all at α = {args.shared_rate:g}")):
        for index, (method, rate) in enumerate(best.items()):
            rate = args.shared_rate if column else rate
            curves = comparison.curves(method, rate)
            shortest = min(map(len, curves))
            for row in range(2):
                values = [[point[row] for point in curve[:shortest]] for curve in curves]
                over_seeds = list(zip(*values, strict=True))
                axes, color = panels[row][column], f"C{index}"
                axes.plot(forwards[:shortest], [mean(v) for v in over_seeds], color=color, label=f"{method}, {rate:g}")
                low, high = [min(v) for v in over_seeds], [max(v) for v in over_seeds]
                axes.fill_between(forwards[:shortest], low, high, color=color, alpha=0.2, linewidth=0)
        panels[0][column].set_title(title)
        panels[0][column].legend(fontsize="x-small")
        panels[1][column].set_xlabel("forward passes")
    panels[0][0].set_ylabel("training loss")
    panels[0][0].set_yscale("log")
    panels[0][0].set_ylim(top=10)
    panels[1][0].set_ylabel("held-out accuracy")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    args = arguments()
    comparison = Comparison(args)
    best = comparison.tune()
    rates = [(method, rate, None) for method in METHODS for rate in {best[method], args.shared_rate}]
    rates += [(ABLATED, best[ABLATED], eps) for eps in args.other_eps]
    comparison.make(
        [comparison.settings(method, rate, seed, eps) for method, rate, eps in rates for seed in args.seeds]
    )
    text = table(comparison, best)
    (args.output / "table.md").write_text(text, encoding="utf-8")
    plot(comparison, best, args.output / "digits.png")
    print(text)


if __name__ == "__main__":
    with command(finished_runs_are_kept), refusals_end_the_command():
        main()
