"""Compare methods fairly over a suite of tasks, with and without task alignment, with controls and a verdict.

    zo-hf evaluate-methods                                        all tasks that need no hub, SmolLM2-135M; days on a CPU
    zo-hf evaluate-methods --model MODEL --tasks sentiment entailment --forward-passes 400 --seeds 0 1 2
    zo-hf evaluate-methods --model MODEL ENCODER                  a table over models; an encoder gets no prompt
    zo-hf evaluate-methods --tasks digits-cnn --forward-passes 5000
    zo-hf evaluate-methods --report-only                          only the report of the finished runs

The model gets every text task in three ways (--alignments). With "prompt", a template surrounds the text, and the answer is a
label word. With "head", the model gets the bare text, and the answer comes from a fresh classification head. With "fitted",
zo_hf.fit_head sets this head first, by a forward pass over the training rows that no method is charged for. The tasks
digits-cnn and digits-transformer train a small network from random weights instead.

All methods get the same rows in the same order and the same number of forward passes. A backward pass counts as two. Every
method first tries --rates learning rates, each with --trial-seeds seeds kept for trials, and more while the best rate is the
largest or smallest tried. The rate with the lowest mean loss on development rows then trains with each of --seeds. Test rows
choose nothing.

Every table has controls: the untrained model, always the same answer, backpropagation ("adamw with backward") and the forward
gradient, which has the exact derivative along as many directions. The controls give the verdict on "low_rank", which has the
same directions and coordinates as the forward gradient:

    reached     low_rank has four fifths of backpropagation's gain over the controls without training
    estimator   low_rank has not, but the forward gradient has: the finite difference is the limit
    task        neither has: the finite difference is not the limit
    no signal   backpropagation gains nothing
    open        the seeds disagree too much to tell, at 95 % confidence

OUTPUT gets runs.jsonl, with a line of JSON for each finished run, report.md and four figures. The same command continues
where it was interrupted. docs/results/evaluation.md defines the verdict.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from zo_hf.comparison.finished_runs import FinishedRuns, finished_runs_are_kept
from zo_hf.comparison.job import ALIGNMENTS, SCRATCH, SETTINGS, Job, Problem
from zo_hf.comparison.methods import FIRST_ORDER, FORWARD_GRADIENT, METHODS, ONE_DIRECTION, added_method, choose
from zo_hf.comparison.options import add_options, check_options, check_passes_to, protocol_of
from zo_hf.comparison.processes import executor_of
from zo_hf.comparison.progress_bar import ProgressBar
from zo_hf.comparison.report import FIGURES, ProblemReport, page, plot
from zo_hf.comparison.schedule import Comparison, run_all
from zo_hf.comparison.subject import parts_of_task
from zo_hf.comparison.suite import HUB, OFFLINE, TASKS, Sizes
from zo_hf.comparison.suite.digits import NETWORKS
from zo_hf.tasks.assets import default_model
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.loading import loaded
from zo_hf.tasks.prompts import label_token_ids
from zo_hf.tasks.refusals import refusals_end_the_command, wrong_arguments_end_the_command
from zo_hf.trainer.output_paths import check_folder

#: Methods that are always part of a table, because the verdict needs them.
ALWAYS = (ONE_DIRECTION, FORWARD_GRADIENT, FIRST_ORDER)


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Run the command; `argv` is the command line without the program's name."""
    with command(finished_runs_are_kept):
        with wrong_arguments_end_the_command():
            args = arguments(argv, prog)
            comparisons = prepare(args)
        with refusals_end_the_command():
            if not args.report_only:
                make_runs(comparisons, args)
            print(report(comparisons, args))


def arguments(argv: list[str] | None, prog: str | None) -> argparse.Namespace:
    """Parse the command line; a wrong one ends the program with exit code 2 and one sentence."""
    parser = CommandParser(prog, description=f"{__doc__}\ntasks:\n{task_list()}")
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        metavar="MODEL",
        help="models of text, folders or names; default: the embedded SmolLM2-135M",
    )
    names = [*OFFLINE, *NETWORKS, *HUB]
    add("--tasks", nargs="+", choices=names, metavar="TASK", help="tasks, listed above; default: all without a hub")
    add(
        "--alignments",
        nargs="+",
        choices=ALIGNMENTS,
        help="default: those that a model has, for tasks of text",
    )
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        default=["rows"],
        help=f"regular expressions of methods beside {', '.join(ALWAYS)}; among {', '.join(METHODS)} (rows)",
    )
    add_options(parser, seeds=range(5), evaluations=10)
    add("--output", type=Path, default=Path("out/evaluate_methods"), help="folder for results (%(default)s)")
    add("--report-only", action="store_true", help="only write the report of the finished runs")
    args = parser.parse_args(argv)
    check_options(parser, args)
    args.tasks = list(dict.fromkeys(args.tasks or [*OFFLINE, *NETWORKS]))
    try:
        added = dict(map(added_method, args.add))
        args.methods = choose([*ALWAYS, *args.methods, *map(re.escape, added)], METHODS | added)
    except ValueError as error:
        parser.error(str(error))
    check_passes_to(parser, args)
    return args


def task_list() -> str:
    """Return a line for each task."""
    lines = [f"    {name:<20}{task.summary}" for name, task in OFFLINE.items()]
    lines += [f"    {name:<20}handwritten digits, from random weights" for name in NETWORKS]
    return "\n".join(lines + [f"    {name:<20}{task.summary}; needs a hub" for name, task in HUB.items()])


def prepare(args: argparse.Namespace) -> list[Comparison]:
    """Return a comparison for each problem, after a look at everything that the runs will need.

    Raises:
        ValueError: a model, a task or the output folder cannot be used.
    """
    check_folder("--output", args.output, *(name for name, _, _ in FIGURES), "report.md")
    if find_spec("matplotlib") is None:
        raise ValueError("zo-hf evaluate-methods needs matplotlib for its figures; run `pip install matplotlib`.")
    ways: list[tuple[str, str]] = []
    if not NETWORKS.keys() >= set(args.tasks):
        args.model = list(dict.fromkeys(args.model or [str(default_model())]))
        ways = [(model, alignment) for model in args.model for alignment in alignments_of(model, args.alignments)]
        for model in [model for model, alignment in ways if alignment == "prompt"]:
            check_label_words(model, [task for task in args.tasks if task not in NETWORKS])
    datasets.disable_progress_bars()
    for task in args.tasks:
        parts = parts_of_task(task, Sizes(args.train_rows, args.eval_rows, args.max_words))
        if len(parts.train) < args.train_rows or len(parts.test) < args.eval_rows:
            rows = f"{len(parts.train)} training, {len(parts.development)} development and {len(parts.test)} test rows"
            print(f"task {task} has fewer rows than wanted: {rows}", file=sys.stderr)
    finished = FinishedRuns(args.output / "runs.jsonl", SETTINGS)
    protocol = protocol_of(args)
    sizes = (args.batch_size, args.train_rows, args.eval_rows, args.max_words, "label_words")
    problems = [
        Problem(model, task, alignment, *sizes)
        for task in args.tasks
        for model, alignment in ([("", SCRATCH)] if task in NETWORKS else ways)
    ]
    return [Comparison(problem, protocol, finished) for problem in problems]


def alignments_of(model: str, wanted: Sequence[str] | None) -> list[str]:
    """Return the ways in which tasks are put to a model: the wanted ones, or without a wish those that it has.

    Raises:
        ValueError: its architecture lacks the language-modeling head or the classification head that is wanted.
    """
    remedy = "name a folder of a language model, or leave the option out for the embedded one"
    config = loaded(f"--model {model}", lambda: AutoConfig.from_pretrained(model), remedy)
    continues = not set(config.architectures or ()).isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    takes_head = config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if wanted is None and (continues or takes_head):
        return [
            alignment for alignment, has in zip(ALIGNMENTS, (continues, takes_head, takes_head), strict=True) if has
        ]
    alignments = list(dict.fromkeys(wanted or ALIGNMENTS))
    if "prompt" in alignments and not continues:
        raise ValueError(
            f"--model {model} was not saved as a causal language model, so it cannot continue a prompt; use --alignments "
            "head, or another model."
        )
    if not {"head", "fitted"}.isdisjoint(alignments) and not takes_head:
        raise ValueError(
            f"--model {model} ({config.model_type}) has no class with a classification head in transformers; use --alignments "
            "prompt, or another model."
        )
    return alignments


def check_label_words(model: str, tasks: Sequence[str]) -> None:
    """Refuse tasks of text whose label words a model's tokenizer does not tell apart.

    Raises:
        ValueError: the message names the task.
    """
    remedy = "name a folder that has a tokenizer, too"
    tokenizer = loaded(f"the tokenizer of --model {model}", lambda: AutoTokenizer.from_pretrained(model), remedy)
    for task in tasks:
        try:
            label_token_ids(tokenizer, TASKS[task].prompt())
        except ValueError as error:
            raise ValueError(
                f"--tasks {task} needs label words, {', '.join(TASKS[task].words)}, whose first tokens after the prompt differ, and "
                f"with the tokenizer of --model {model} they do not; leave the task out, or use --alignments head."
            ) from error


def make_runs(comparisons: Sequence[Comparison], args: argparse.Namespace) -> None:
    """Make the runs that are missing, with a progress bar, and renew the report whenever a problem is finished."""
    executor = executor_of(args.processes)
    with ProgressBar(comparisons) as bar:

        def done(comparison: Comparison, job: Job) -> None:
            bar.done(comparison, job)
            if not comparison.wanted():
                report(comparisons, args)

        try:
            run_all(comparisons, executor, args.processes, bar.starts, done)
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


def report(comparisons: Sequence[Comparison], args: argparse.Namespace) -> str:
    """Write the report and the figures of the methods whose runs are all finished; return the report."""
    reports: list[ProblemReport] = []
    for comparison in comparisons:
        zero_shot, results = comparison.zero_shot(), comparison.results()
        if zero_shot is not None and results:
            reports.append(ProblemReport(comparison.problem, results, zero_shot, comparison.failed))
    if not reports:
        return "the runs of no method are finished yet\n"
    text = page(reports, heading(args), args.passes_to)
    (args.output / "report.md").write_text(text, encoding="utf-8")
    for name, key, against in FIGURES:
        plot(reports, key, against, args.output / name)
    return text


def heading(args: Any) -> str:
    """Return the sentence that says how the runs were made."""
    model = "".join(f"{Path(model).name}, " for model in args.model or [])
    return (
        f"{model}{args.forward_passes} forward passes of {args.batch_size} rows, {args.rates} learning rates in "
        f"{args.trial_seeds} trials of {args.trial_forward_passes}, {args.eval_rows} test rows, seeds "
        f"{', '.join(map(str, args.seeds))}; mean ± standard deviation over seeds."
    )
