# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,peft]"]
# ///
"""Compare methods at the same sentences, batches, loss and number of forward passes, with tuned learning rates.

    python recipes/compare_methods.py                                  # SmolLM2-135M, embedded; needs no hub; many hours
    python recipes/compare_methods.py --model MODEL --methods mezo 'low_rank.*' --forward-passes 1000 --seeds 0 1 2
    python recipes/compare_methods.py --add 'sign q4' 3e-4 zo_rule=sign zo_num_directions=4 --methods mezo 'sign q4'
    python recipes/compare_methods.py --plot-only --figures docs/figures

First every method tries the same number of learning rates, each in --trial-seeds short trials with seeds of their own.
The first rates are the center of the method's grid, and --ratio times more and less. If the best rate is the largest or
the smallest, the next one goes one step further; otherwise it lies between the best rate and its better neighbor.

The rate with the lowest mean loss on development sentences then trains from the start with each of --seeds, which determine
the order of sentences and the directions. These runs are scored on test sentences as they train. The learning rate is
constant. The embeddings and the norms do not train unless the method's name says otherwise.

The results in OUTPUT are runs.jsonl, a line for each finished run from which an interrupted comparison continues, and
table.md. The figures, methods-forward-passes.png and methods-time.png, are saved in --figures. docs/results/methods.md
explains the columns of the table, and the further table of --passes-to.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common.finished import add_report_options
from common.method_report import plot, table

from zo_hf.comparison.finished_runs import FinishedRuns, finished_runs_are_kept
from zo_hf.comparison.job import SETTINGS, Job, Problem
from zo_hf.comparison.methods import METHODS, added_method, choose
from zo_hf.comparison.options import add_options, check_options, check_passes_to, protocol_of
from zo_hf.comparison.passes import passes_table
from zo_hf.comparison.processes import executor_of
from zo_hf.comparison.progress_bar import ProgressBar
from zo_hf.comparison.schedule import Comparison, run_all
from zo_hf.tasks.assets import default_model
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.refusals import refusals_end_the_command
from zo_hf.trainer.output_paths import check_folder


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--model", help="a causal language model, a folder or a name; default: the embedded SmolLM2-135M")
    names = ", ".join(METHODS)
    add("--methods", nargs="+", metavar="METHOD", help=f"regular expressions of method names; default: all ({names})")
    add_options(parser, seeds=range(3), evaluations=20)
    add(
        "--loss",
        choices=("label_words", "vocabulary"),
        default="label_words",
        help="the cross entropy of the label word among the label words, or among all (%(default)s)",
    )
    add_report_options(parser, Path("out/compare_methods"))
    args = parser.parse_args(argv)
    check_options(parser, args)
    args.model = args.model or str(default_model())
    args.figures = args.figures or args.output
    try:
        args.methods = choose(args.methods, METHODS | dict(map(added_method, args.add)))
    except ValueError as error:
        parser.error(str(error))
    check_passes_to(parser, args)
    return args


def comparison_of(args: argparse.Namespace) -> Comparison:
    """Return the comparison that the arguments describe: one task, put to the model with a prompt."""
    problem = Problem(
        args.model,
        "sentiment",
        "prompt",
        args.batch_size,
        args.train_rows,
        args.eval_rows,
        args.max_words,
        args.loss,
    )
    return Comparison(problem, protocol_of(args), FinishedRuns(args.output / "runs.jsonl", SETTINGS))


def report(comparison: Comparison, args: argparse.Namespace) -> str:
    """Write the table and the figures of the methods whose runs are all finished; return the table."""
    zero_shot, results = comparison.zero_shot(), comparison.results()
    if zero_shot is None or not results:
        return "the runs of no method are finished yet\n"
    text = (
        f"{Path(args.model).name}, {args.forward_passes} forward passes of {args.batch_size} sentences, "
        f"{args.rates} learning rates in {args.trial_seeds} trials "
        f"of {args.trial_forward_passes}, {args.eval_rows} test sentences, loss {args.loss}, seeds {', '.join(map(str, args.seeds))}.\n\n{table(results, zero_shot[0])}"
    )
    if passes := passes_table(results, zero_shot[0]["scores"][-1], args.passes_to):
        text += f"\n{passes}"
    (args.output / "table.md").write_text(text, encoding="utf-8")
    plot(results, zero_shot[0], "forward_passes", args.figures / "methods-forward-passes.png")
    plot(results, zero_shot[0], "seconds", args.figures / "methods-time.png")
    return text


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    check_folder("--figures", args.figures)
    comparison = comparison_of(args)
    if not args.plot_only:
        executor = executor_of(args.processes)
        with ProgressBar([comparison]) as bar:

            def done(comparison: Comparison, job: Job) -> None:
                bar.done(comparison, job)
                if job.method in args.methods and comparison.plan(job.method).result is not None:
                    report(comparison, args)

            try:
                run_all([comparison], executor, args.processes, bar.starts, done)
            finally:
                executor.shutdown(wait=False, cancel_futures=True)
    print(report(comparison, args))
    for method, reason in comparison.failed.items():
        print(f"failed: {method}: {reason}")


if __name__ == "__main__":
    with command(finished_runs_are_kept), refusals_end_the_command():
        main()
