"""Options of the command line that every comparison has: its budget, its tuning, its rows and its processes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch

from zo_hf.comparison.schedule import Protocol

#: Options that count something, so that none may be below 1.
_COUNTS = (
    *("forward_passes", "trial_forward_passes", "rates", "trial_seeds", "evaluations"),
    *("batch_size", "train_rows", "eval_rows", "max_words", "processes"),
)


def add_options(parser: argparse.ArgumentParser, seeds: Sequence[int], evaluations: int) -> None:
    """Add the options to a parser.

    Args:
        parser: the parser of the command.
        seeds: default of `--seeds`.
        evaluations: default of `--evaluations`.
    """
    add = parser.add_argument
    add(
        "--add",
        nargs="+",
        action="append",
        default=[],
        metavar="WORD",
        help="another method: its name, the center of its learning rates, and OPTION=VALUE ... of ZOConfig",
    )
    add("--seeds", type=int, nargs="+", default=list(seeds), help="seeds of the full runs (%(default)s)")
    add("--forward-passes", type=int, default=2000, help="forward passes of a full run (%(default)s)")
    add("--trial-forward-passes", type=int, default=500, help="forward passes of a trial (%(default)s)")
    add(
        "--rates",
        type=int,
        default=5,
        help="number of learning rates that each method tries; up to as many more while the best is at an end "
        "(%(default)s)",
    )
    add("--trial-seeds", type=int, default=2, help="number of trials with each learning rate (%(default)s)")
    add("--ratio", type=float, default=4.0, help="ratio of the first learning rates that are tried (%(default)s)")
    add("--factor", type=float, default=1.0, help="factor on the centers of rates that grow with slopes (%(default)s)")
    add("--evaluations", type=int, default=evaluations, help="number of scores during a full run (%(default)s)")
    add("--batch-size", type=int, default=8, help="rows in a forward pass (%(default)s)")
    add("--train-rows", type=int, default=1000, help="number of training rows (%(default)s)")
    add("--eval-rows", type=int, default=200, help="number of development and of test rows (%(default)s)")
    add("--max-words", type=int, default=16, help="words in a text that is not made by rule (%(default)s)")
    add(
        "--passes-to",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="methods to whose final loss a further table counts every method's forward passes",
    )
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    add("--processes", type=int, default=cores, help="parallel runs, of one thread each (%(default)s)")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with one sentence if one of the options has a value that no comparison can use."""
    for name in _COUNTS:
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1.")
    if args.ratio <= 1:
        parser.error(f"--ratio {args.ratio} must be above 1.")
    if args.factor <= 0:
        parser.error(f"--factor {args.factor} must be above 0.")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))} must differ, or a spread would be none.")


def check_passes_to(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with one sentence if `--passes-to` names a method that is not compared."""
    for name in args.passes_to:
        if name not in args.methods:
            parser.error(f"--passes-to {name} is none of the methods compared: {', '.join(args.methods)}.")


def protocol_of(args: argparse.Namespace) -> Protocol:
    """Return what the options ask for; `args.methods` are the methods by name."""
    return Protocol(
        args.methods,
        args.seeds,
        args.forward_passes,
        args.trial_forward_passes,
        args.rates,
        args.trial_seeds,
        args.ratio,
        args.factor,
        args.evaluations,
    )
