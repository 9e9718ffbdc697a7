"""Shared code of simulations: their options, and a file of results with a plot next to it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zo_hf.trainer.output_paths import check_file


def simulation_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every simulation has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the results; a plot is saved next to it")
    return parser


def check_output(output: Path | None) -> None:
    """Refuse a file of results that cannot be written, before anything is simulated."""
    if output is not None:
        check_file("--output", output)


def write_results(args: argparse.Namespace, rows: Sequence[Mapping[str, float]]) -> None:
    """Write the options of a simulation, and its results, to its `--output`."""
    setup = {name: value for name, value in vars(args).items() if name != "output"}
    args.output.write_text(json.dumps({"setup": setup, "rows": rows}, indent=1) + "\n")


@contextmanager
def plotted(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Enter a context that yields a plot's axis, and then saves the plot.

    Args:
        path: file of the plot.
        size: width and height in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="tight")
    yield figure.add_subplot()
    figure.savefig(path, dpi=120)
