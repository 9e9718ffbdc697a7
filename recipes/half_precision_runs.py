# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo]", "matplotlib"]
# ///
"""Train the same run with weights in float32, bfloat16 and float16, and compare the curves of loss and accuracy.

    python recipes/half_precision_runs.py --output runs.jsonl --figure runs.png
    python recipes/half_precision_runs.py --output runs.jsonl --seeds 42 1 --job "--per_device_train_batch_size 8"

A run is `zo-hf train --offline --dtype DTYPE --seed SEED` with the options of --job. Runs of one seed have the same sentences,
batches and directions, so their curves differ by rounding alone. Runs of another seed show how much a curve may differ.
Finished runs are kept in --output, and the same command continues with the next.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zo_hf.comparison.finished_runs import FinishedRuns, finished_runs_are_kept
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.job_arguments import parse_arguments
from zo_hf.tasks.refusals import refusals_end_the_command
from zo_hf.tasks.sentiment_job import build_trainer, prepare, run
from zo_hf.trainer.output_paths import check_file

DTYPES = ("float32", "bfloat16", "float16")
SETTINGS = ("dtype", "seed", "job")
#: The curves of a run: their key in the log, their place in the plot, and their name.
CURVES = (("loss", "training loss"), ("eval_loss", "held-out loss"), ("eval_accuracy", "held-out accuracy"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="dtypes of the weights (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[42], help="seeds (%(default)s)")
    add("--output", type=Path, required=True, help="file of the finished runs")
    add("--figure", type=Path, help="file for a plot of the curves")
    add("--job", default="", help="options of `zo-hf train`, in quotation marks")
    args = parser.parse_args(arguments)
    if args.figure is not None:
        check_file("--figure", args.figure)
    finished = FinishedRuns(args.output, SETTINGS)
    runs = []
    with command(finished_runs_are_kept):
        for seed in args.seeds:
            for dtype in tqdm(args.dtypes, desc=f"seed {seed}", unit="run"):
                settings = {"dtype": dtype, "seed": seed, "job": args.job}
                make = partial(trained, dtype, seed, shlex.split(args.job))
                runs.append(finished.found_or_made(settings, make))
    print(table(runs))
    if args.figure is not None:
        draw(runs, args.figure)


def trained(dtype: str, seed: int, job: Sequence[str]) -> dict[str, Any]:
    """Train once, and return the curves, each a list of (step, value), and the accuracy at the end."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--offline", "--dtype", dtype, "--seed", str(seed), "--output_dir", folder, *job]
        task_arguments, config = parse_arguments(options, None, None)
        with contextlib.redirect_stdout(io.StringIO()):
            task = prepare(task_arguments, config)
            trainer = build_trainer(task, config)
            metrics = run(task, trainer)
        log = trainer.state.log_history
    curves = {key: [(entry["step"], entry[key]) for entry in log if key in entry] for key, _ in CURVES}
    return json.loads(json.dumps(curves)) | {
        "accuracy": metrics["accuracy"],
        "zero_shot": metrics["zero_shot_accuracy"],
        "rounding": next((entry["zo/rounding_noise"] for entry in log if "zo/rounding_noise" in entry), None),
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return a table of the curves' last values, and of their distance to those of float32 with the same seed."""
    lines = [
        "| dtype | seed | rounding noise | training loss | apart | held-out loss | apart | accuracy before | after |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in runs:
        exact = next((r for r in runs if (r["dtype"], r["seed"]) == ("float32", one["seed"])), None)
        cells = [one["dtype"], str(one["seed"]), "" if one["rounding"] is None else f"{one['rounding']:.2f}"]
        for key in ("loss", "eval_loss"):
            cells += [f"{one[key][-1][1]:.3f}", "" if exact is None else f"{distance(one[key], exact[key]):.3f}"]
        lines.append(f"| {' | '.join(cells)} | {one['zero_shot']:.3f} | {one['accuracy']:.3f} |")
    return "\n".join(lines)


def distance(curve: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Return the root mean square of the difference between two curves at the same steps."""
    squares = [(value - there) ** 2 for (_, value), (_, there) in zip(curve, other, strict=True)]
    return (sum(squares) / len(squares)) ** 0.5


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw every curve against the step: a color for a dtype, a kind of line for a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    dtypes, seeds = ([*dict.fromkeys(one[key] for one in runs)] for key in ("dtype", "seed"))
    for axis, (key, name) in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        for one in runs:
            color, style = f"C{dtypes.index(one['dtype'])}", ("-", "--", ":", "-.")[seeds.index(one["seed"]) % 4]
            axis.plot(*zip(*one[key], strict=True), style, color=color, label=f"{one['dtype']}, seed {one['seed']}")
        axis.set(xlabel="step", title=name)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    with command(), refusals_end_the_command():
        main()
