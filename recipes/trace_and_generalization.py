# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[plot]", "scikit-learn>=1.4"]
# ///
"""Ask whether larger steps of two-point descent end where the Hessian's trace is smaller, and generalize better.

    python recipes/trace_and_generalization.py                         # two networks, five seeds; minutes of one core
    python recipes/trace_and_generalization.py --seeds 0 --margins 8 1
    python recipes/trace_and_generalization.py --plot-only --figures docs/figures

That is what "Zeroth-Order Optimization at the Edge of Stability" (arXiv 2604.14669) says of the step size. A network of
1,210 weights (64-16-10) learns some of scikit-learn's digits, with the paper's setting: full batch, squared loss ½|f - y|²,
two-point estimates along one Gaussian direction.

    η = η* / margin        η*: the critical step size of the initial network, from its whole Hessian

Runs are compared at equal training loss and not after equal steps: when the loss at the weights, which is looked at every
20 steps, first is below a level. There the whole Hessian gives trace, λmax and η*, all other digits give the test loss, and
the weights their distance from the start. A seed draws the weights, the training pictures and the directions, which are the
same for all step sizes.

Networks so small are trained side by side: a step of all runs is one batch of matrix products. The results are runs.jsonl
in OUTPUT, which --plot-only reads, table.md, and trace-and-generalization.png in FIGURES.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common.finished import FILE, add_report_options, folder_of_figures, read_runs, report_runs
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn import functional as F
from tqdm import tqdm

from zo_hf.stability import critical_step_size
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.refusals import refusals_end_the_command
from zo_hf.trainer.output_paths import check_folder

PIXELS, HIDDEN, CLASSES = 64, 16, 10
SIZES = (PIXELS * HIDDEN, HIDDEN, HIDDEN * CLASSES, CLASSES)
PICTURES = 1797
LOOK_EVERY = 20
DIVERGED = 1e3  # a run has diverged when its loss is this many times the initial loss

#: Names that every line of the results has.
NAMES = ("activation", "seed", "margin", "step_size", "step")

ACTIVATIONS = {"gelu": F.gelu, "tanh": torch.tanh}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--activations", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS), help="networks (%(default)s)")
    add("--margins", type=float, nargs="+", default=[8.0, 4.0, 2.0, 1.4, 1.0], help="η*/η at the start (%(default)s)")
    add("--levels", type=float, nargs="+", default=[0.2, 0.1, 0.05], help="training losses (%(default)s)")
    add("--examples", type=int, default=100, help="training pictures (%(default)s)")
    add("--eps", type=float, default=1e-3, help="distance of a probe (%(default)s: the paper's)")
    add("--steps", type=int, default=40_000, help="steps after which a run ends (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the runs (%(default)s)")
    add_report_options(parser, Path("out/trace_and_generalization"))
    args = parser.parse_args(words)
    for name in ("margins", "levels", "eps"):
        values = getattr(args, name)
        if not min(values if isinstance(values, list) else [values]) > 0:
            parser.error(f"--{name} must be above 0.")
    if args.steps < LOOK_EVERY:
        parser.error(f"--steps {args.steps} must be at least {LOOK_EVERY}, after which losses are looked at.")
    if not 2 <= args.examples < PICTURES:
        parser.error(f"--examples {args.examples} must be 2 to {PICTURES - 1}; the others of {PICTURES} are the test.")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))} must differ, or a spread would be none.")
    if args.plot_only and not (args.output / FILE).exists():
        parser.error(f"--plot-only needs {args.output / FILE}; make the runs first, without it.")
    return args


def outputs(weights: Tensor, inputs: Tensor, activation: str) -> Tensor:
    """Return what networks compute.

    Args:
        weights: of every network, (networks, 1210).
        inputs: (networks, rows, 64).
        activation: a name in `ACTIVATIONS`.

    Returns:
        (networks, rows, 10)
    """
    first, bias, second, other_bias = weights.split(SIZES, dim=-1)
    hidden = torch.baddbmm(bias[:, None], inputs, first.unflatten(-1, (PIXELS, HIDDEN)))
    hidden = ACTIVATIONS[activation](hidden)
    return torch.baddbmm(other_bias[:, None], hidden, second.unflatten(-1, (HIDDEN, CLASSES)))


def squared_losses(weights: Tensor, inputs: Tensor, targets: Tensor, activation: str) -> Tensor:
    """Return ½|f - y|², averaged over examples, of every network, (networks,); targets: (networks, rows, 10)."""
    return 0.5 * (outputs(weights, inputs, activation) - targets).square().sum(-1).mean(-1)


def initial_weights(seed: int) -> Tensor:
    """Draw the weights of a network, (1210,), with the variance of one over a layer's inputs, and zero biases."""
    normal = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(seed))
    first, bias, second, other_bias = normal.split(SIZES)
    return torch.cat([first / PIXELS**0.5, 0 * bias, second / HIDDEN**0.5, 0 * other_bias])


def pictures(seed: int, examples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the inputs and one-hot classes of the training pictures that a seed draws, and of all others."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    inputs, classes = torch.tensor(data.data, dtype=torch.float32)[order], torch.eye(CLASSES)[data.target][order]
    # Without this, the mean picture would be one direction with a curvature far above that of all others.
    known = inputs[:examples]
    inputs = (inputs - known.mean(0)) / (known.std(0) + 1)
    return inputs[:examples], classes[:examples], inputs[examples:], classes[examples:]


def spectrum(weights: Tensor, inputs: Tensor, targets: Tensor, activation: str) -> Tensor:
    """Return the eigenvalues of the Hessian of one network's loss, float64 (1210,), in ascending order."""

    def loss(point: Tensor) -> Tensor:
        return squared_losses(point[None], inputs[None], targets[None], activation)[0]

    slope, units = grad(loss), torch.eye(len(weights), dtype=weights.dtype)
    matrix = vmap(lambda unit: jvp(slope, (weights,), (unit,))[1], chunk_size=256)(units).double()
    return torch.linalg.eigvalsh(0.5 * (matrix + matrix.T))


class Runs:
    """The runs of one kind of network, side by side.

    Args:
        activation: a name in `ACTIVATIONS`.
        args: the arguments of the command.
    """

    def __init__(self, activation: str, args: argparse.Namespace) -> None:
        self._activation, self._args = activation, args
        parts = [pictures(seed, args.examples) for seed in args.seeds]
        self._train = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
        self._test = torch.stack([part[2] for part in parts]), torch.stack([part[3] for part in parts])
        starts = self._starts = [initial_weights(seed) for seed in args.seeds]
        self._generators = [torch.Generator().manual_seed(seed + 1) for seed in args.seeds]
        critical = [
            critical_step_size(self._spectrum(index, start), negative="ignore") for index, start in enumerate(starts)
        ]
        pairs = [(index, margin) for index in range(len(starts)) for margin in args.margins]
        self._seed_of = torch.tensor([index for index, _ in pairs])
        self._margins = [margin for _, margin in pairs]
        self._rates = torch.tensor([critical[index] / margin for index, margin in pairs])
        self.weights = torch.stack(starts)[self._seed_of]
        self._reached = [0] * len(pairs)
        self._goes_on = torch.ones(len(pairs), dtype=torch.bool)
        self.found: list[dict[str, Any]] = []

    def _spectrum(self, index: int, weights: Tensor) -> Tensor:
        return spectrum(weights, self._train[0][index], self._train[1][index], self._activation)

    def train(self) -> list[dict[str, Any]]:
        """Make all runs, and return a dictionary for every level that one of them has reached, and for its end."""
        first = self.losses()
        for step in tqdm(range(1, self._args.steps + 1), desc=self._activation, unit="step"):
            self.step()
            if step % LOOK_EVERY == 0:
                self._look(step, first)
                if not self._goes_on.any():
                    break
        for run in self._goes_on.nonzero().flatten().tolist():
            self.found.append(self._named(run, self._args.steps) | {"end": "steps"})
        return self.found

    def step(self) -> None:
        """Take a step of every run that has not ended: ξ ← ξ - η·(L(ξ + εz) - L(ξ - εz))/2ε·z."""
        directions = torch.stack([torch.randn(sum(SIZES), generator=each) for each in self._generators])
        runs = self._goes_on.nonzero().flatten()
        seeds, eps = self._seed_of[runs], self._args.eps
        z, weights = directions[seeds], self.weights[runs]
        inputs, targets = (part[seeds].repeat(2, 1, 1) for part in self._train)
        plus, minus = squared_losses(
            torch.cat([weights + eps * z, weights - eps * z]), inputs, targets, self._activation
        ).chunk(2)
        self.weights[runs] = weights - (self._rates[runs] * (plus - minus) / (2 * eps))[:, None] * z

    def losses(self) -> Tensor:
        """Return the training loss of every run at its weights, (runs,)."""
        inputs, targets = (part[self._seed_of] for part in self._train)
        return squared_losses(self.weights, inputs, targets, self._activation)

    def _look(self, step: int, first: Tensor) -> None:
        losses = self.losses()
        for run in self._goes_on.nonzero().flatten().tolist():
            loss, levels = float(losses[run]), self._args.levels
            if not loss < DIVERGED * float(first[run]):
                self.found.append(self._named(run, step) | {"end": "diverged"})
                self._goes_on[run] = False
                continue
            while self._reached[run] < len(levels) and loss < levels[self._reached[run]]:
                level = {"level": levels[self._reached[run]], "loss": loss}
                self.found.append(self._named(run, step) | level | self._measured(run))
                self._reached[run] += 1
            self._goes_on[run] = self._reached[run] < len(levels)

    def _named(self, run: int, step: int) -> dict[str, Any]:
        seed, margin = self._args.seeds[int(self._seed_of[run])], self._margins[run]
        rate = float(self._rates[run])
        return {"activation": self._activation, "seed": seed, "margin": margin, "step_size": rate, "step": step}

    def _measured(self, run: int) -> dict[str, float]:
        index = int(self._seed_of[run])
        values = self._spectrum(index, self.weights[run])
        inputs, targets = (part[index : index + 1] for part in self._test)
        answers = outputs(self.weights[run : run + 1], inputs, self._activation)
        return {
            "trace": float(values.sum()),
            "largest": float(values[-1]),
            "critical": critical_step_size(values, negative="ignore"),
            "distance": float((self.weights[run] - self._starts[index]).norm()),
            "test_loss": float(0.5 * (answers - targets).square().sum(-1).mean()),
            "test_accuracy": float((answers.argmax(-1) == targets.argmax(-1)).float().mean()),
        }


def finished(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a file.

    Raises:
        ValueError: the file has other lines, or runs of an earlier version, which measured less.
    """
    points = read_runs(path, NAMES)
    for point in points:
        missing = [name for name in (*COLUMNS, "critical") if name not in point]
        if "level" in point and missing:
            raise ValueError(
                f"{path} holds runs of an earlier version without {missing[0]!r}; make the runs again, without --plot-only."
            )
    return points


COLUMNS = {
    "step": "steps",
    "trace": "Tr",
    "largest": "λmax",
    "distance": "distance from the start",
    "test_loss": "test loss",
    "test_accuracy": "accuracy",
}


def chosen(points: Sequence[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """Return the points with these entries."""
    return [point for point in points if all(point.get(key) == value for key, value in wanted.items())]


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation."""
    return f"{mean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def table(args: argparse.Namespace, points: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a row for each network, level and step size, and the differences between step sizes.

    Below it stand the runs that have diverged, each with its step.
    """
    heads = ["network", "training loss", "η*/η", "runs", "η/η* there", *COLUMNS.values()]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    differences = [
        "",
        "| network | training loss | η*/η | pairs | Tr, ratio | test loss, difference | accuracy, difference |",
    ]
    differences.append("|---|" + "---:|" * 6)
    for activation in args.activations:
        for level in args.levels:
            here = chosen(points, activation=activation, level=level)
            small = {point["seed"]: point for point in chosen(here, margin=max(args.margins))}
            for margin in args.margins:
                found = chosen(here, margin=margin)
                if not found:
                    lines.append(f"| {activation} | {level:g} | {margin:g} | 0 |" + " |" * (len(heads) - 4))
                    continue
                at_edge = spread([point["step_size"] / point["critical"] for point in found])
                cells = [spread([point[key] for point in found]) for key in COLUMNS]
                lines.append(
                    f"| {activation} | {level:g} | {margin:g} | {len(found)} | {at_edge} | " + " | ".join(cells) + " |"
                )
                pairs = [(point, small[point["seed"]]) for point in found if point["seed"] in small]
                if pairs and margin != max(args.margins):
                    ratios = spread([large["trace"] / other["trace"] for large, other in pairs])
                    changes = [
                        spread([large[key] - other[key] for large, other in pairs])
                        for key in ("test_loss", "test_accuracy")
                    ]
                    cells = [activation, f"{level:g}", f"{margin:g}", str(len(pairs)), ratios, *changes]
                    differences.append("| " + " | ".join(cells) + " |")
    diverged = chosen(points, end="diverged")
    ends = ", ".join(f"{p['activation']} {p['seed']} {p['margin']:g}: {p['step']}" for p in diverged)
    return "\n".join([*lines, *differences, *(["", ends] if diverged else [])]) + "\n"


def plot(args: argparse.Namespace, points: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Draw trace, test loss and accuracy at equal training loss against the step size: seeds, and their mean.

    The figure is trace-and-generalization.png.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = {"trace": "Tr H", "test_loss": "test loss", "test_accuracy": "test accuracy"}
    rows = len(args.activations)
    figure, panels = pyplot.subplots(rows, len(keys), figsize=(11, 3.2 * rows), sharex=True, squeeze=False)
    for row, activation in zip(panels, args.activations, strict=True):
        for axes, (key, label) in zip(row, keys.items(), strict=True):
            for index, level in enumerate(args.levels):
                here = chosen(points, activation=activation, level=level)
                axes.plot(
                    [1 / point["margin"] for point in here],
                    [point[key] for point in here],
                    ".",
                    color=f"C{index}",
                    alpha=0.4,
                )
                margins = [margin for margin in args.margins if len(chosen(here, margin=margin)) == len(args.seeds)]
                means = [mean(point[key] for point in chosen(here, margin=margin)) for margin in margins]
                axes.plot(
                    [1 / margin for margin in margins], means, color=f"C{index}", label=f"training loss {level:g}"
                )
            axes.set(xscale="log", ylabel=label, title=activation)
            axes.set_xticks([1 / margin for margin in args.margins], [f"1/{margin:g}" for margin in args.margins])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        row[0].legend(fontsize="x-small")
    for axes in panels[-1]:
        axes.set_xlabel("η/η* at the start")
    figure.tight_layout()
    figure.savefig(folder / "trace-and-generalization.png", dpi=110)


def main() -> None:
    args = arguments()
    args.levels = sorted(args.levels, reverse=True)
    results = args.output / FILE
    check_folder("--output", args.output)
    check_folder("--figures", folder_of_figures(args))
    torch.set_num_threads(1)
    if not args.plot_only:
        found = [point for activation in args.activations for point in Runs(activation, args).train()]
        results.write_text("".join(json.dumps(point) + "\n" for point in found), encoding="utf-8")
    points = finished(results)
    report_runs(args, points, functools.partial(table, args), functools.partial(plot, args))


if __name__ == "__main__":
    with command(lambda: "nothing is kept; the next start begins anew"), refusals_end_the_command():
        main()
