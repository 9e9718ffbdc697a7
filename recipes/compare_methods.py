# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,peft]"]
# ///
"""Compare methods at the same sentences, batches, loss and number of forward passes, with tuned learning rates.

    python recipes/compare_methods.py                                  # SmolLM2-135M, embedded; needs no hub; many hours
    python recipes/compare_methods.py --model MODEL --methods mezo 'low_rank.*' --forward-passes 1000 --seeds 0 1 2
    python recipes/compare_methods.py --add 'sign q4' 3e-4 zo_rule=sign zo_num_directions=4 --methods mezo 'sign q4'
    python recipes/compare_methods.py --plot-only --figures docs/figures

First every method makes the same number of short trials, with a seed of their own. The first trials use the learning
rate at the center of the method's grid, and rates that are --ratio times larger and smaller. If the best rate is the
largest or the smallest, the next trial goes one step further; otherwise it lies between the best rate and its better
neighbor.

The rate with the lowest loss on development sentences then trains from the start with each of --seeds, which determine
the order of sentences and the directions. These runs are scored on test sentences as they train. The learning rate is
constant. The embeddings and the norms do not train unless the method's name says otherwise.

The results in OUTPUT are runs.jsonl, a line for each finished run from which an interrupted comparison continues, and
table.md. The figures, methods-forward-passes.png and methods-time.png, are saved in --figures. docs/methods.md
explains the columns of the table.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from common.experiments import FinishedRuns, finished_runs_are_kept
from common.method_report import REFERENCE, Result, plot, table
from common.method_runs import SETTINGS, Job, run
from tqdm import tqdm
from transformers.utils import logging

from zo_hf import ZOConfig
from zo_hf.directions import DISTRIBUTIONS
from zo_hf.estimators import ESTIMATORS
from zo_hf.rules import RULES
from zo_hf.subspaces import SUBSPACES
from zo_hf.tasks.assets import default_model
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.refusals import refusals_end_the_command
from zo_hf.trainer.output_paths import check_folder

REGISTRIES: dict[str, Mapping[str, Any]] = {
    "zo_subspace": SUBSPACES,
    "zo_estimator": ESTIMATORS,
    "zo_direction": DISTRIBUTIONS,
    "zo_rule": RULES,
}
MATRICES = {"zo_exclude_modules": r".*(embed|norm).*"}
LOW_RANK = {"zo_subspace": "low_rank"} | MATRICES
FULL = {"zo_subspace": "full"} | MATRICES
ROWS = {"zo_rows_per_direction": 1, "zo_direction": "rademacher"}
FOUR = {"zo_num_directions": 4}
TRIAL_SEED = 12_345


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        group: the panel of the figures in which the method is drawn.
        rate: the center of its grid of learning rates.
        options: options of ZOConfig; `"backward": True` is a plain Trainer.
    """

    group: str
    rate: float
    options: Mapping[str, Any]


METHODS = {
    REFERENCE: Method("subspaces", 3e-5, FULL),
    "mezo all weights": Method("subspaces", 1e-5, {"zo_subspace": "full"}),
    "low_rank": Method("subspaces", 3e-5, LOW_RANK),
    "core": Method("subspaces", 3e-5, MATRICES | {"zo_subspace": "core"}),
    "lora": Method("subspaces", 3e-4, {"zo_subspace": "adapter"}),
    "norms": Method("subspaces", 3e-3, {"zo_subspace": "norms"}),
    "mezo rademacher": Method("directions", 3e-5, FULL | {"zo_direction": "rademacher"}),
    "sphere": Method("directions", 3e-5, LOW_RANK | {"zo_direction": "sphere"}),
    "orthogonal q4": Method("directions", 1e-4, LOW_RANK | FOUR | {"zo_direction": "orthogonal"}),
    "sparse": Method("directions", 3e-5, FULL | {"zo_direction": "sparse"}),
    "layers": Method("directions", 3e-5, LOW_RANK | {"zo_direction": "layers"}),
    "adaptive layers": Method("directions", 3e-5, LOW_RANK | {"zo_direction": "adaptive_layers"}),
    "two_point q4": Method("estimators", 1e-4, LOW_RANK | FOUR),
    "one_sided q4": Method("estimators", 1e-4, LOW_RANK | FOUR | {"zo_estimator": "one_sided"}),
    "fzoo q8": Method(
        "estimators",
        1e-6,
        LOW_RANK | {"zo_estimator": "fzoo", "zo_direction": "rademacher", "zo_num_directions": 8},
    ),
    "evolution q4": Method("estimators", 3e-4, LOW_RANK | FOUR | {"zo_estimator": "evolution"}),
    "rows": Method("estimators", 1e-4, LOW_RANK | ROWS),
    "rows adamw": Method("optimizers", 1e-3, LOW_RANK | ROWS | {"optim": "adamw_torch"}),
    "cocd": Method(
        "estimators",
        1e-3,
        {"zo_subspace": "norms", "zo_estimator": "coordinate", "zo_rule": "cocd", "zo_num_directions": 8},
    ),
    "low_rank normalized": Method("optimizers", 3e-4, LOW_RANK | {"zo_normalize": True}),
    "low_rank momentum": Method("optimizers", 3e-6, LOW_RANK | {"optim_args": "momentum=0.9"}),
    "low_rank adamw": Method("optimizers", 1e-3, LOW_RANK | {"optim": "adamw_torch"}),
    "sign": Method("optimizers", 3e-4, LOW_RANK | {"zo_rule": "sign"}),
    "conservative": Method("rules", 3e-5, LOW_RANK | {"zo_rule": "conservative"}),
    "curvature": Method("rules", 3e-5, LOW_RANK | {"zo_estimator": "second_difference", "zo_rule": "curvature"}),
    "svrg": Method("rules", 3e-5, LOW_RANK | {"zo_rule": "svrg"}),
    "zo-muon": Method(
        "rules",
        3e-4,
        LOW_RANK | FOUR | {"zo_rank": 64, "zo_fold_steps": 100, "zo_estimator": "one_sided", "zo_rule": "muon"},
    ),
    "power_iteration": Method(
        "rules",
        3e-4,
        LOW_RANK
        | FOUR
        | {"zo_rank": 64, "zo_fold_steps": 100, "zo_estimator": "one_sided", "zo_rule": "power_iteration"},
    ),
    "forward gradient": Method("controls", 3e-5, LOW_RANK | {"zo_estimator": "forward_gradient"}),
    "adamw with backward": Method("controls", 1e-4, MATRICES | {"backward": True, "optim": "adamw_torch"}),
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--model", help="a causal language model, a folder or a name; default: the embedded SmolLM2-135M")
    names = ", ".join(METHODS)
    add("--methods", nargs="+", metavar="METHOD", help=f"regular expressions of method names; default: all ({names})")
    add(
        "--add",
        nargs="+",
        action="append",
        default=[],
        metavar="WORD",
        help="another method: its name, the center of its learning rates, and OPTION=VALUE ... of ZOConfig",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the full runs (%(default)s)")
    add("--forward-passes", type=int, default=2000, help="forward passes of a full run (%(default)s)")
    add("--trial-forward-passes", type=int, default=500, help="forward passes of a trial (%(default)s)")
    add("--rates", type=int, default=5, help="number of trials of each method (%(default)s)")
    add(
        "--factor",
        type=float,
        default=1.0,
        help="factor on all grids' centers, for another model or loss (%(default)s)",
    )
    add("--ratio", type=float, default=4.0, help="ratio of the learning rates of the first trials (%(default)s)")
    add("--evaluations", type=int, default=20, help="number of scores during a full run (%(default)s)")
    add("--batch-size", type=int, default=8, help="sentences in a forward pass (%(default)s)")
    add("--train-rows", type=int, default=1000, help="number of training sentences (%(default)s)")
    add("--eval-rows", type=int, default=200, help="number of development and of test sentences (%(default)s)")
    add(
        "--loss",
        choices=("label_words", "vocabulary"),
        default="label_words",
        help="the cross entropy of the label word among the label words, or among all (%(default)s)",
    )
    add("--max-words", type=int, default=16, help="maximum number of words in a sentence (%(default)s)")
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    add("--processes", type=int, default=cores, help="parallel runs, of one thread each (%(default)s)")
    add("--output", type=Path, default=Path("out/compare_methods"), help="folder for results (%(default)s)")
    add("--figures", type=Path, help="folder for figures (OUTPUT)")
    add("--plot-only", action="store_true", help="only write the table and the figures of the finished runs")
    args = parser.parse_args(argv)
    for option in ("forward_passes", "trial_forward_passes", "rates", "evaluations", "batch_size", "processes"):
        if getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} {getattr(args, option)} must be at least 1.")
    if args.ratio <= 1:
        parser.error(f"--ratio {args.ratio} must be above 1.")
    if args.factor <= 0:
        parser.error(f"--factor {args.factor} must be above 0.")
    args.model = args.model or str(default_model())
    args.figures = args.figures or args.output
    try:
        args.methods = choose(args.methods, METHODS | dict(map(added_method, args.add)))
    except ValueError as error:
        parser.error(str(error))
    return args


def added_method(words: list[str]) -> tuple[str, Method]:
    """Return the method that `--add` describes.

    Raises:
        ValueError: the words are not a name, a learning rate, and options.
    """
    name, *numbers = words[:2]
    pairs = [word.partition("=") for word in words[2:]]
    if not numbers or not all(separator for _, separator, _ in pairs):
        raise ValueError(f"--add {' '.join(words)} must be a name, a learning rate, and OPTION=VALUE words.")
    return name, Method("added", float(numbers[0]), {option: read_value(value) for option, _, value in pairs})


def read_value(word: str) -> Any:
    """Parse a word of the command line as YAML, and a number like 1e-8 as a number."""
    value = yaml.safe_load(word)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def choose(patterns: list[str] | None, methods: dict[str, Method]) -> dict[str, Method]:
    """Return the methods whose whole name matches a pattern; skip those that this version of zo_hf does not have.

    Raises:
        ValueError: a pattern matches no method.
    """
    for pattern in patterns or []:
        if not any(re.fullmatch(pattern, name) for name in methods):
            raise ValueError(f"--methods {pattern} matches none of {', '.join(methods)}.")
    chosen = {}
    for name, method in methods.items():
        if patterns is not None and not any(re.fullmatch(pattern, name) for pattern in patterns):
            continue
        missing = missing_options(method.options)
        if missing:
            print(f"skipped {name}: this version of zo_hf has no {', '.join(missing)}")
        else:
            chosen[name] = method
    return chosen


def missing_options(options: Mapping[str, Any]) -> list[str]:
    """Return the options of a method that this version of zo_hf does not have, or not with this value."""
    known = {field.name for field in fields(ZOConfig)} | {"backward"}
    return [
        f"{option}={value}"
        for option, value in options.items()
        if option not in known or (option in REGISTRIES and value not in REGISTRIES[option])
    ]


@dataclass(frozen=True)
class Plan:
    """The progress of one method.

    Attributes:
        wanted: runs that can start now.
        made: number of finished runs.
        result: the method's result, once all full runs are finished.
    """

    wanted: list[Job]
    made: int
    result: Result | None = None


class Comparison:
    """The finished runs, and those that still have to be made.

    Attributes:
        failed: the errors of methods that failed, by name.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.finished = FinishedRuns(args.output / "runs.jsonl", SETTINGS)
        self.failed: dict[str, str] = {}

    def job(self, method: str, rate: float, seed: int, budget: int, evaluations: int) -> Job:
        """Return a run of a method."""
        args = self.args
        options = json.dumps(dict(args.methods[method].options), sort_keys=True) if method in args.methods else "{}"
        task = (args.batch_size, args.train_rows, args.eval_rows, args.max_words, args.loss)
        return Job(args.model, method, options, rate, seed, budget, evaluations, *task)

    @property
    def zero_shot(self) -> Job:
        """The evaluation of the untrained model."""
        return self.job("zero-shot", 0.0, 0, 0, 1)

    def find(self, job: Job) -> dict[str, Any] | None:
        """Return the finished run of a job, or None."""
        return self.finished.find(asdict(job))

    def plan(self, method: str) -> Plan:
        """Return which runs of a method can start next, given its finished runs."""
        args = self.args

        def trial(rate: float) -> Job:
            return self.job(method, rate, TRIAL_SEED, args.trial_forward_passes, 0)

        rates = first_rates(args.methods[method].rate * args.factor, args.ratio, args.rates)
        while True:
            trials = {rate: self.find(trial(rate)) for rate in rates}
            losses = {rate: made["scores"][-1]["loss"] for rate, made in trials.items() if made is not None}
            if len(losses) < len(rates):
                return Plan([trial(rate) for rate in rates if rate not in losses], len(losses))
            if len(losses) == args.rates:
                break
            rates.append(next_rate(losses, args.ratio))
        best = min(losses, key=lambda rate: finite(losses[rate]))
        jobs = [self.job(method, best, seed, args.forward_passes, args.evaluations) for seed in args.seeds]
        runs = [made for made in map(self.find, jobs) if made is not None]
        made = len(losses) + len(runs)
        if len(runs) < len(jobs):
            return Plan([job for job in jobs if self.find(job) is None], made)
        at_edge = len(losses) > 1 and best in (min(losses), max(losses))
        return Plan([], made, Result(args.methods[method].group, best, at_edge, runs))

    def made(self) -> int:
        """Return the number of finished runs."""
        return (self.find(self.zero_shot) is not None) + sum(self.plan(method).made for method in self.args.methods)

    def wanted(self) -> list[Job]:
        """Return all runs that can start now, in the order of the methods in the table."""
        jobs = [] if self.find(self.zero_shot) else [self.zero_shot]
        for method in self.args.methods:
            if method not in self.failed:
                jobs += self.plan(method).wanted
        return jobs

    def run_all(self, executor: Executor, done: Callable[[Job], None]) -> None:
        """Make all runs, as many in parallel as `--processes` allows, and call `done` after each."""
        pending: dict[Future[dict[str, Any]], Job] = {}
        while True:
            for job in self.wanted():
                if len(pending) < self.args.processes and job not in pending.values():
                    pending[executor.submit(run, job)] = job
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                job = pending.pop(future)
                error = future.exception()
                if error is None:
                    self.finished.add(asdict(job) | future.result())
                elif isinstance(error, BrokenProcessPool):
                    raise SystemExit(
                        "A process was killed, probably for lack of memory; use fewer --processes. Finished runs are kept."
                    )
                elif isinstance(error, Exception) and job != self.zero_shot:
                    self.failed[job.method] = f"{type(error).__name__}: {error}"
                else:
                    raise error
                done(job)

    def report(self) -> str:
        """Write the table and the figures of the methods whose runs are all finished; return the table."""
        args = self.args
        zero_shot = self.find(self.zero_shot)
        results = {name: result for name in args.methods if (result := self.plan(name).result) is not None}
        if zero_shot is None or not results:
            return "the runs of no method are finished yet\n"
        text = (
            f"{Path(args.model).name}, {args.forward_passes} forward passes of {args.batch_size} sentences, "
            f"{args.rates} trials of {args.trial_forward_passes} for each learning rate, {args.eval_rows} test "
            f"sentences, loss {args.loss}, seeds {', '.join(map(str, args.seeds))}.\n\n{table(results, zero_shot)}"
        )
        (args.output / "table.md").write_text(text, encoding="utf-8")
        plot(results, zero_shot, "forward_passes", args.figures / "methods-forward-passes.png")
        plot(results, zero_shot, "seconds", args.figures / "methods-time.png")
        return text


def first_rates(center: float, ratio: float, trials: int) -> list[float]:
    """Return the learning rates of a method's first trials."""
    return [center, center * ratio, center / ratio][:trials]


def next_rate(losses: Mapping[float, float], ratio: float) -> float:
    """Return a rate beyond the best one if that is at an end, else between the best one and its better neighbor."""
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda i: finite(losses[rates[i]]))
    if at == len(rates) - 1:
        return rates[at] * ratio
    if at == 0:
        return rates[at] / ratio
    neighbor = min(rates[at - 1], rates[at + 1], key=lambda rate: finite(losses[rate]))
    return math.sqrt(rates[at] * neighbor)


def finite(loss: float) -> float:
    """Return the loss, or infinity if it is not finite, so that losses can be compared."""
    return loss if math.isfinite(loss) else math.inf


class InThisProcess(Executor):
    """An executor that runs a job at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def prepare_process() -> None:
    """Set up a process that makes runs: one thread, no progress bars, and an end together with the parent process."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    parent = multiprocessing.parent_process()
    if parent is not None:

        def exit_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=exit_with_parent, daemon=True).start()


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    check_folder("--figures", args.figures)
    comparison = Comparison(args)
    if not args.plot_only:
        executor: Executor
        if args.processes == 1:
            prepare_process()
            executor = InThisProcess()
        else:
            spawn = multiprocessing.get_context("spawn")
            executor = ProcessPoolExecutor(args.processes, mp_context=spawn, initializer=prepare_process)
        total = 1 + len(args.methods) * (args.rates + len(args.seeds))
        with tqdm(total=total, initial=comparison.made(), unit="run", smoothing=0) as bar:

            def show(job: Job) -> None:
                kind = "trial" if job.evaluations == 0 else f"seed {job.seed}"
                bar.set_description(f"{job.method}, {kind}, {job.learning_rate:.2g}", refresh=False)
                bar.update(comparison.made() - bar.n)
                if job.method in args.methods and comparison.plan(job.method).result is not None:
                    comparison.report()

            try:
                comparison.run_all(executor, show)
            finally:
                executor.shutdown(wait=False, cancel_futures=True)
    print(comparison.report())
    for method, reason in comparison.failed.items():
        print(f"failed: {method}: {reason}")


if __name__ == "__main__":
    with command(finished_runs_are_kept), refusals_end_the_command():
        main()
