"""Shared frame of recipes that make many runs: their options, the runs that are missing, and the report of all."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zo_hf.comparison.finished_runs import FinishedRuns, runs_in
from zo_hf.trainer.output_paths import check_folder

#: Results of the runs, a line of JSON each, in OUTPUT.
FILE = "runs.jsonl"

Runs = Sequence[Mapping[str, Any]]


def add_report_options(parser: argparse.ArgumentParser, output: Path) -> None:
    """Add --output, --figures and --plot-only; `output` is the default folder."""
    add = parser.add_argument
    add("--output", type=Path, default=output, help="folder for results (%(default)s)")
    add("--figures", type=Path, help="folder for figures (OUTPUT)")
    add("--plot-only", action="store_true", help="only write the table and the figures of the finished runs")


def finished_runs(
    args: argparse.Namespace,
    names: Sequence[str],
    wanted: Iterable[Mapping[str, Any]],
    train: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Make the runs that are missing, unless --plot-only forbids it, and return the finished ones.

    Args:
        args: the arguments of the command, see `add_report_options`.
        names: the names of the settings that identify a run.
        wanted: the settings of every run.
        train: makes a run, and returns its settings with its results.

    Raises:
        ValueError: a folder cannot be written to, or the file of finished runs is damaged.
    """
    check_folder("--figures", folder_of_figures(args))
    wanted, log = list(wanted), FinishedRuns(args.output / FILE, names)
    if not args.plot_only:
        for settings in tqdm([settings for settings in wanted if log.find(settings) is None], unit="run"):
            log.add(train(settings))
    return [run for settings in wanted if (run := log.find(settings)) is not None]


def report_runs(
    args: argparse.Namespace, runs: Runs, table: Callable[[Runs], str], plot: Callable[[Runs, Path], None]
) -> None:
    """Write table.md to OUTPUT, draw the figures in FIGURES, and print the table; without runs, say so.

    Args:
        args: the arguments of the command, see `add_report_options`.
        runs: the finished runs.
        table: returns their table.
        plot: draws their figures in a folder.
    """
    if not runs:
        print("no run is finished yet")
        return
    text = table(runs)
    (args.output / "table.md").write_text(text, encoding="utf-8")
    plot(runs, folder_of_figures(args))
    print(text)


def folder_of_figures(args: argparse.Namespace) -> Path:
    """Return --figures, or --output without it."""
    return args.figures or args.output


def read_runs(path: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the runs of a file that is written at once, with these names in each.

    Raises:
        ValueError: the file has other lines.
    """
    return runs_in(path.read_text(encoding="utf-8"), path, names)
