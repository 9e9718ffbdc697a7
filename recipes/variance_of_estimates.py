# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,peft]"]
# ///
"""Measure what antithetic rows and clean losses do to the variance of an estimate, beside autograd's gradient.

    python recipes/variance_of_estimates.py --model MODEL                      # ten minutes of one core for Stories-15M

At the start and after some steps of training, estimates of the gradient of a batch are made in several ways from the
same directions and as many forward passes. Row i of the batch has the share ℓᵢ of its loss:

    two-sided                        cᵢ = (ℓᵢ(ξ + ε·zᵢ) − ℓᵢ(ξ − ε·zᵢ)) / 2ε          two passes, zo_hf's default
    one-sided, own clean loss        cᵢ = (ℓᵢ(ξ + ε·zᵢ) − ℓᵢ(ξ)) / ε                  two passes, zo_estimator=one_sided
    one-sided, mean clean loss       the mean of ℓⱼ(ξ) over the batch in place of ℓᵢ(ξ)
    one-sided, mean of other rows    the mean of ℓⱼ(ξ + ε·zⱼ) over j ≠ i in place of ℓᵢ(ξ), one pass
    one-sided, no clean loss         nothing in place of ℓᵢ(ξ), one pass
    pairs z, z    pairs z, −z        rows 2k and 2k + 1 share a direction, with equal or opposite signs

The mean of two draws stands for the ways of one pass. The table has the variance E‖ĝ − g‖² / ‖g‖², the cosine with g,
and E‖ĝ‖² of the default over that of each way, which is how much longer a step may be.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from noise_scale_beside_autograd import Task, engine, spread
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging

from zo_hf import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.rng import Stream
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.refusals import refusals_end_the_command
from zo_hf.trainer.output_paths import check_file

#: Index of the step that directions are drawn for; training has used the steps from 0 on.
FIRST_STEP = 10**6


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a causal language model, a folder or a name")
    add("--batch-size", type=int, default=16, help="sentences in a batch, an even number (%(default)s)")
    add("--steps", type=int, default=100, help="steps of training before the second measurement (%(default)s)")
    add("--learning-rate", type=float, default=9e-6, help="the constant learning rate of SGD (%(default)s)")
    add("--eps", type=float, nargs="+", default=[1e-3, 1e-2], help="distances ε of the measurements (%(default)s)")
    add("--batches", type=int, default=4, help="batches of a measurement (%(default)s)")
    add("--draws", type=int, default=2, help="pairs of draws for each batch (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds (%(default)s)")
    add("--output", type=Path, help="file for the table")
    args = parser.parse_args(words)
    if args.batch_size < 4 or args.batch_size % 2:
        parser.error(f"--batch-size {args.batch_size} must be an even number from 4 on, because rows come in pairs.")
    return args


class Batch:
    """The losses of a batch's rows at any points, and what autograd says.

    Args:
        zo: moves the coordinates.
        closure: returns the loss of every row.
        rows: rows of the batch.
    """

    def __init__(self, zo: ZerothOrder, closure: Callable[[], Tensor], rows: int) -> None:
        assert zo.subspace.coordinate_blocks is not None
        (self._block,) = zo.subspace.coordinate_blocks
        self._zo, self._closure, self._rows = zo, closure, rows
        with zo.subspace.differentiable() as leaves:
            parts = torch.autograd.grad(self._shares().sum(), leaves)
        names = zo.subspace.coordinates
        self.gradient = self._block.layout.join(dict(zip(names, parts, strict=True)))
        with torch.no_grad():
            self.clean = self._shares()

    def _shares(self) -> Tensor:
        return self._closure().as_subclass(Tensor) / self._rows

    @torch.no_grad()
    def at(self, step: int, signs: Sequence[float], shared: int = 1) -> tuple[Tensor, Tensor]:
        """Return ℓᵢ(ξ + signs[i] · zᵢ) and z, (rows,) and (rows, d); `shared` consecutive rows have the same z."""
        zo = self._zo
        probes = [Probe(row // shared, sign) for row, sign in enumerate(signs)]
        streams = [Stream(zo.seed, step, probe.direction) for probe in probes]
        with zo.subspace.at(probes, lambda index: streams[index * shared], zo.distribution, rows=1):
            losses = self._shares()
        return losses, torch.stack([self._block.direction(stream, zo.distribution) for stream in streams])


def estimates(batch: Batch, step: int, eps: float) -> dict[str, Tensor]:
    """Return the estimates of one draw, (d,) each; those named "(one pass)" cost half of the others' passes."""
    clean, rows = batch.clean, len(batch.clean)
    plus, z = batch.at(step, [eps] * rows)
    minus, _ = batch.at(step, [-eps] * rows)
    others = (plus.sum() - plus) / (rows - 1)
    found = {
        "two-sided": (plus - minus) / (2 * eps) @ z,
        "one-sided, own clean loss": (plus - clean) / eps @ z,
        "one-sided, mean clean loss": (plus - clean.mean()) / eps @ z,
        "one-sided, mean of other rows (one pass)": (plus - others) / eps @ z,
        "one-sided, no clean loss (one pass)": plus / eps @ z,
    }
    signs = torch.tensor([1.0, -1.0]).repeat(rows // 2)
    plus, z = batch.at(step, [eps] * rows, shared=2)
    minus, _ = batch.at(step, [-eps] * rows, shared=2)
    opposite = torch.where(signs > 0, plus, minus)  # each row's loss at its own sign
    return found | {
        "two-sided, pairs z, z or z, −z": (plus - minus) / (2 * eps) @ z,
        "one-sided, own clean loss, pairs z, z": (plus - clean) / eps @ z,
        "one-sided, own clean loss, pairs z, −z": (opposite - clean) * signs / eps @ z,
        "one-sided, no clean loss, pairs z, −z (one pass)": opposite * signs / eps @ z,
    }


def measure(
    task: Task, zo: ZerothOrder, args: argparse.Namespace, eps: float
) -> dict[str, tuple[float, float, float]]:
    """Return the variance, the cosine and the mean ‖ĝ‖² of every way, relative to ‖g‖², by its name."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for number in range(args.batches):
        batch = Batch(zo, task.loss(zo.model, task.draw(args.batch_size)), args.batch_size)
        g = batch.gradient
        for draw in range(args.draws):
            step = FIRST_STEP + 2 * (number * args.draws + draw)
            first, second = (estimates(batch, step + half, eps) for half in (0, 1))
            for name, one in first.items():
                each = [(one + second[name]) / 2] if "one pass" in name else [one, second[name]]
                for estimate in each:
                    error, square = ((estimate - g).square().sum() / g.square().sum(), estimate.square().sum())
                    cosine = torch.cosine_similarity(estimate, g, dim=0)
                    values = (error.item(), cosine.item(), (square / g.square().sum()).item())
                    found.setdefault(name, []).append(values)
    return {name: tuple(map(mean, zip(*values, strict=True))) for name, values in found.items()}  # type: ignore[misc]


def run(args: argparse.Namespace, seed: int) -> dict[tuple[int, float], Mapping[str, Any]]:
    """Train, and return the measurements by the steps before them and their ε."""
    task = Task(args.model, "vocabulary", "low_rank", seed)
    zo, optimizer = engine(task.model(), "low_rank", seed, 1, 0, args.learning_rate)
    found = {}
    for step in tqdm(range(args.steps + 1), desc=f"seed {seed}", unit="step"):
        if step in (0, args.steps):
            found |= {(step, eps): measure(task, zo, args, eps) for eps in args.eps}
        if step < args.steps:
            zo.estimate(task.loss(zo.model, task.draw(args.batch_size)))
            optimizer.step()
    zo.finish()
    return found


def table(runs: Sequence[Mapping[tuple[int, float], Mapping[str, Any]]]) -> str:
    """Return means over seeds ± their standard deviation."""
    lines = ["| step | ε | estimate | variance | cosine | longer step |", "|---:|---:|---|---:|---:|---:|"]
    for step, eps in runs[0]:
        points = [one[step, eps] for one in runs]
        for name in points[0]:
            variance, cosine, _ = zip(*(point[name] for point in points), strict=True)
            gain = [point["two-sided"][2] / point[name][2] for point in points]
            lines.append(f"| {step} | {eps:g} | {name} | {spread(variance)} | {spread(cosine)} | {spread(gain)} |")
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    if args.output is not None:
        check_file("--output", args.output)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    runs = []
    for seed in args.seeds:
        runs.append(run(args, seed))
        text = table(runs)
        if args.output is not None:
            args.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    with command(), refusals_end_the_command():
        main()
