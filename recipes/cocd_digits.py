# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[plot]", "scikit-learn>=1.4"]
# ///
"""Compare coherent coordinate descent with methods without its memory, on scikit-learn's digits.

    python recipes/cocd_digits.py                          # a network of 4,810 weights; ten minutes of one core
    python recipes/cocd_digits.py --network resnet20       # ResNet-20, 269,434 weights; twenty minutes of one core
    python recipes/cocd_digits.py --processes 1 --forwards 40000 --seeds 0

First, every method makes a full run with each learning rate on the first seed, since a rate that is the best for a
third of a run may diverge later. The rate with the lowest training loss then trains with every seed. On the small
network, so does the rate that all methods share, as in the paper (arXiv 2605.14373). On ResNet-20, methods with
"slopes" in their names take derivatives by autograd in place of differences, so that tuning takes a tenth of the time.

The results in OUTPUT are runs.jsonl, from which an interrupted comparison continues, table.md, digits.png, and
coherence.png: how well the differences that CoCD remembers agree with those that it measures next.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from common.coordinate_descents import EngineDescent, SlopeDescent
from common.coordinate_report import POINTS, Report, final
from common.coordinate_studies import STUDIES
from common.digit_pictures import Digits, measure
from tqdm import tqdm

from zo_hf.comparison.finished_runs import FinishedRuns, finished_runs_are_kept
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.refusals import refusals_end_the_command

SETTINGS = ("network", "method", "learning_rate", "eps", "seed", "forwards")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--network", choices=STUDIES, default="mlp", help="4,810 weights or 269,434 (%(default)s)")
    add("--methods", nargs="+", help="methods, by their names in the table (all)")
    add("--forwards", type=int, help="forward passes of a run (the method's own)")
    add("--learning-rates", type=float, nargs="+", help="learning rates to try (the method's own)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs (%(default)s)")
    add("--processes", type=int, default=os.cpu_count(), help="parallel runs (%(default)s: one for each core)")
    add("--output", type=Path, help="folder for results (out/cocd_digits/NETWORK)")
    args = parser.parse_args(words)
    args.output = args.output or Path("out/cocd_digits") / args.network
    known = STUDIES[args.network].methods
    for name in args.methods or ():
        if name not in known:
            parser.error(f"--methods {name!r} is unknown; choose among {', '.join(map(repr, known))}.")
    for name in ("forwards", "processes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1.")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))} must differ, or a spread would be none.")
    return args


def train(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make one run; measure the training loss and the held-out accuracy during it, and the coherence in every step."""
    torch.set_num_threads(1)
    torch.manual_seed(settings["seed"])
    study = STUDIES[settings["network"]]
    method, digits, model = study.methods[settings["method"]], Digits(study.shape), study.make()
    rate, seed = settings["learning_rate"], settings["seed"]
    if method.has_slopes:
        descent: EngineDescent | SlopeDescent = SlopeDescent(model, method, rate, seed)
    else:
        descent = EngineDescent(model, method, rate, settings["eps"], seed)
    started, curve = time.process_time(), [measure(model, digits)]
    coherence: list[tuple[int, float]] = []
    every = settings["forwards"] / POINTS
    for pictures, labels in digits.batches(seed, method.batch_size):
        descent.take_step(pictures, labels)
        found = descent.coherence()
        if found is not None:
            coherence.append((descent.forward_passes, round(found, 5)))
        if descent.forward_passes >= every * len(curve):
            point = measure(model, digits)
            # A step may take more passes than lie between two points.
            while descent.forward_passes >= every * len(curve):
                curve.append(point)
            del curve[POINTS + 1 :]
            if not point[0] < 10 * curve[0][0] or len(curve) > POINTS:
                break
    result = {"curve": curve, "coherence": coherence, "coordinates": descent.coordinates, "steps": descent.steps}
    return dict(settings) | result | {"seconds": time.process_time() - started}


class Comparison:
    """The requested runs of one network."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.study = args, STUDIES[args.network]
        self.methods = args.methods or list(self.study.methods)
        self.finished = FinishedRuns(args.output / "runs.jsonl", SETTINGS)

    def settings(self, method: str, learning_rate: float, seed: int, eps: float | None = None) -> dict[str, Any]:
        """Return the settings that identify a run."""
        own = self.study.methods[method]
        values = (self.args.network, method, learning_rate, eps or own.eps, seed, self.args.forwards or own.forwards)
        return dict(zip(SETTINGS, values, strict=True))

    def make(self, runs: list[dict[str, Any]]) -> None:
        """Make the missing runs, several in parallel."""
        missing = list({tuple(run.values()): run for run in runs if self.finished.find(run) is None}.values())
        spawn, running = multiprocessing.get_context("spawn"), set[Future[dict[str, Any]]]()
        with (
            ProcessPoolExecutor(self.args.processes, mp_context=spawn) as pool,
            tqdm(total=len(missing), unit="run") as progress,
        ):
            while missing or running:
                # After Ctrl-C, processes would go on with runs that wait for them.
                while missing and len(running) < self.args.processes:
                    running.add(pool.submit(train, missing.pop(0)))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for job in done:
                    self.finished.add(job.result())
                    progress.update()

    def runs(self, method: str, learning_rate: float, eps: float | None = None) -> list[dict[str, Any]]:
        """Return the run of every seed."""
        found = [self.finished.find(self.settings(method, learning_rate, seed, eps)) for seed in self.args.seeds]
        return [run for run in found if run is not None]

    def tune(self) -> dict[str, float]:
        """Return the learning rate of each method for which the first seed ends at the lowest loss."""
        first = self.args.seeds[0]
        rates = {name: self.args.learning_rates or self.study.methods[name].rates for name in self.methods}
        self.make([self.settings(name, rate, first) for name in self.methods for rate in rates[name]])

        def end(method: str, rate: float) -> float:
            run = self.finished.find(self.settings(method, rate, first))
            assert run is not None
            return final(run["curve"])[0]

        return {name: min(rates[name], key=lambda rate: end(name, rate)) for name in self.methods}


def main() -> None:
    args = arguments()
    comparison = Comparison(args)
    best, study = comparison.tune(), comparison.study
    rates = [(name, rate, None) for name, own in best.items() for rate in {own, study.shared_rate or own}]
    if study.ablated is not None and study.ablated[0] in best:
        rates += [(study.ablated[0], best[study.ablated[0]], eps) for eps in study.ablated[1]]
    comparison.make([comparison.settings(*rate[:2], seed, rate[2]) for rate in rates for seed in args.seeds])
    report = Report(study, best, comparison.runs)
    text = report.table()
    (args.output / "table.md").write_text(text, encoding="utf-8")
    report.plot(args.output / "digits.png")
    report.plot_coherence(args.output / "coherence.png")
    print(text)


if __name__ == "__main__":
    with command(finished_runs_are_kept), refusals_end_the_command():
        main()
