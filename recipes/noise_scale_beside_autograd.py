# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,peft]"]
# ///
"""Compare the gradient noise scale that forward passes find, and the gain it predicts, with autograd's along a run.

    python recipes/noise_scale_beside_autograd.py --model MODEL                 # ten minutes of one core for Stories-15M
    python recipes/noise_scale_beside_autograd.py --plot-only --figures docs/figures

A run trains a language model to label sentences, with a direction for every row. At some of its points the model is
copied, and the copy, which does not move, shows

- B_s from the gradients of single sentences, which autograd computes for the coordinates that move;
- B_s as the engine estimates it, in as many measured steps as --estimates says;
- E‖ĝ‖² with one direction for all rows, over E‖ĝ‖² with a direction for every row. This is how much longer a step may
  be. The first-order theory predicts (1 + B_s/B) / (1/G + B_s/B), with G = B directions.

The run itself logs zo/noise_scale. The results are runs.jsonl in OUTPUT, from which an interrupted comparison continues,
table.md, and the figure noise-scale.png in FIGURES.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common.finished import add_report_options, finished_runs, report_runs
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)
from transformers.utils import logging

from zo_hf import RowLosses, ZerothOrder
from zo_hf.comparison.finished_runs import finished_runs_are_kept
from zo_hf.comparison.subject import with_lora
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.data import embedded_reviews
from zo_hf.tasks.prompts import PROMPT_A, LabelWordCollator, encode_example, label_token_ids
from zo_hf.tasks.refusals import refusals_end_the_command

SETTINGS = (
    "model",
    "loss",
    "subspace",
    "learning_rate",
    "batch_size",
    "steps",
    "points",
    "sentences",
    "estimates",
    "every",
    "seed",
)
DATA_SEED = 0
WORDS = range(8, 13)
EXCLUDED = r".*(embed|norm|Norm).*"  # the matrices of the layers move
TRAIN_ROWS = 1000


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a causal language model (an encoder for --loss head), a folder or a name")
    losses = ("vocabulary", "label_words", "head")
    add(
        "--loss",
        choices=losses,
        default=losses[0],
        help="the cross entropy of the label word among all words or among the label words, or that of a fresh "
        "classification head (%(default)s)",
    )
    add(
        "--subspace",
        choices=("low_rank", "adapter"),
        default="low_rank",
        help="the coordinates: factors of the layers' matrices, or B of a LoRA adapter of rank 8 (%(default)s)",
    )
    add("--learning-rate", type=float, default=1.8e-5, help="the constant learning rate of SGD (%(default)s)")
    add("--batch-size", type=int, default=16, help="sentences in a forward pass (%(default)s)")
    add("--steps", type=int, default=200, help="steps of a run; 0 measures the start alone (%(default)s)")
    add("--points", type=int, default=6, help="points: the start, the end, and a half, a quarter ... (%(default)s)")
    add("--sentences", type=int, default=256, help="sentences with a gradient from autograd (%(default)s)")
    add("--estimates", type=int, default=48, help="steps of each kind at a point (%(default)s)")
    add("--every", type=int, default=10, help="zo_noise_scale_steps of the run (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of batches and directions (%(default)s)")
    add_report_options(parser, Path("out/noise_scale_beside_autograd"))
    args = parser.parse_args(words)
    for option, least in (("steps", 0), ("points", 2), ("sentences", 3), ("estimates", 1), ("every", 1)):
        if getattr(args, option) < least:
            parser.error(f"--{option} {getattr(args, option)} must be at least {least}.")
    if args.batch_size < 2:
        parser.error(f"--batch-size {args.batch_size} must be at least 2, because directions are shared in pairs.")
    return args


def noise_scale(gradients: Tensor) -> tuple[float, float]:
    """Return B_s = E‖∇ℓ_row − g‖² / ‖g‖² of a sample of gradients, and its standard error (jackknife).

    Products of different rows estimate ‖g‖² without the bias of ‖mean gradient‖², as in McCandlish et al.
    (arXiv 1812.06162, appendix A). If their mean is not positive, noise hides the gradient, and both results are
    infinite.

    Args:
        gradients: (rows, d), at least three rows.
    """
    gram = (gradients @ gradients.T).double()
    count, squares = len(gram), gram.diagonal()
    products = gram.sum(1) - squares

    def scale(rows: int, squared: Tensor, crossed: Tensor) -> Tensor:
        return squared / rows / (crossed / (rows * (rows - 1))) - 1

    if products.sum() <= 0:
        return math.inf, math.inf
    value = scale(count, squares.sum(), products.sum())
    without = scale(count - 1, squares.sum() - squares, products.sum() - 2 * products)
    error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt()
    return value.item(), error.item()


def predicted_gain(scale: float, rows: int) -> float:
    """Return (1 + B_s/B) / (1/G + B_s/B) for a batch of B rows with G = B directions."""
    return (1 + scale / rows) / ((1 + scale) / rows) if math.isfinite(scale) else 1.0


class Task:
    """Sentences, and a loss for every row.

    Args:
        path: the model, a folder or a name.
        loss: "vocabulary" is the model's own loss of the label word, "label_words" compares the label words alone, and
            "head" is the loss of a fresh classification head on an encoder.
        subspace: with "adapter" the model has a LoRA adapter.
        seed: determines the order of the sentences, a fresh head, and A of an adapter.
    """

    def __init__(self, path: str, loss: str, subspace: str, seed: int) -> None:
        self._path, self._loss, self._subspace, self._seed = path, loss, subspace, seed
        self.tokenizer = tokenizer = AutoTokenizer.from_pretrained(path)
        sentences, longest = embedded_reviews(TRAIN_ROWS, 1, DATA_SEED, WORDS).train, 4 * WORDS.stop
        if loss == "head":
            self.examples: Sequence[dict[str, Any]] = [
                {"input_ids": tokenizer(row["text"])["input_ids"][:longest], "labels": row["label"]}
                for row in sentences
            ]
        else:
            self._label_ids = label_token_ids(tokenizer, PROMPT_A)
            self.examples = [
                encode_example(tokenizer, PROMPT_A, row["text"], self._label_ids[row["label"]], longest)
                for row in sentences
            ]
        self._generator = torch.Generator().manual_seed(seed)

    def model(self) -> Any:
        """Return the model as it is stored, in float32, with the adapter that moves if one does."""
        model: Any
        if self._loss == "head":
            torch.manual_seed(self._seed)  # transformers draws the head from torch's own generator
            model = AutoModelForSequenceClassification.from_pretrained(self._path, num_labels=2, dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_pretrained(self._path, dtype=torch.float32)
        return (with_lora(model, self._seed) if self._subspace == "adapter" else model).eval()

    def draw(self, rows: int) -> list[int]:
        """Return the indices of sentences of a batch, all different."""
        return torch.randperm(len(self.examples), generator=self._generator)[:rows].tolist()

    def loss(self, model: Any, rows: Sequence[int]) -> Callable[[], RowLosses]:
        """Return the closure of a batch."""
        examples = [self.examples[row] for row in rows]
        causal = self._loss != "head"
        collator: Any = LabelWordCollator(self.tokenizer, model) if causal else DataCollatorWithPadding(self.tokenizer)
        batch = dict(collator(examples))
        answers = batch.pop("labels")
        if causal:
            answers = answers[:, -1]
        if self._loss == "label_words":
            answers = (answers[:, None] == torch.tensor(self._label_ids)).int().argmax(1)

        def closure() -> RowLosses:
            logits = model(**batch).logits
            if causal:
                logits = logits[:, -2]
            if self._loss == "label_words":
                logits = logits[:, self._label_ids]
            return RowLosses(torch.nn.functional.cross_entropy(logits, answers, reduction="none"))

        return closure


def engine(
    model: Any, subspace: str, seed: int, rows_per_direction: int, every: int, rate: float
) -> tuple[ZerothOrder, Any]:
    """Return an engine that moves the layers' matrices or an adapter, and its optimizer."""
    zo = ZerothOrder(
        model,
        subspace,
        exclude_modules=EXCLUDED if subspace == "low_rank" else None,  # any pattern would make A of an adapter move
        direction="rademacher",
        rows_per_direction=rows_per_direction,
        noise_scale_steps=every,
        batched_probes=False,
        seed=seed,
    )
    return zo, zo.prepare(torch.optim.SGD(zo.coordinates(), lr=rate))


def logged(zo: ZerothOrder) -> float | None:
    """Return zo/noise_scale of now, or None while there is none."""
    assert zo.row_groups is not None
    return zo.row_groups.logs().get("zo/noise_scale")


def from_autograd(task: Task, zo: ZerothOrder, sentences: int) -> dict[str, float]:
    """Return B_s from gradients of single sentences, its standard error, and their mean loss."""
    gradients, losses = [], []
    for row in task.draw(sentences):
        with zo.subspace.differentiable() as leaves:
            loss = task.loss(zo.model, [row])().as_subclass(Tensor).sum()
            parts = torch.autograd.grad(loss, leaves)
        gradients.append(torch.cat([part.flatten() for part in parts]))
        losses.append(loss.item())
    value, error = noise_scale(torch.stack(gradients))
    return {"autograd": value, "error": error, "loss": mean(losses)}


def from_forward_passes(task: Task, zo: ZerothOrder, optimizer: Any, rows: int, steps: int) -> float:
    """Take steps of length zero, and return the mean of ‖ĝ‖² over those that share no directions."""
    assert zo.row_groups is not None
    squares = []
    for step in range(steps):
        zo.estimate(task.loss(zo.model, task.draw(rows)))
        if not zo.row_groups.noise_scale.due(step):
            gradient = [p.grad for p in zo.subspace.coordinates.values() if p.grad is not None]
            squares.append(sum(part.square().sum().item() for part in gradient))
        optimizer.step()
    return mean(squares)


def measure(task: Task, weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what autograd and forward passes say at one point, on copies of the model."""
    rows, estimates = settings["batch_size"], settings["estimates"]
    found: dict[str, Any] = {}
    squares = []
    for rows_per_direction, every in ((1, 2), (rows, 0)):
        model = task.model()
        model.load_state_dict(weights)
        zo, optimizer = engine(model, settings["subspace"], settings["seed"] + 1, rows_per_direction, every, 0.0)
        if rows_per_direction == 1:
            found |= from_autograd(task, zo, settings["sentences"])
        steps = 2 * estimates if every else estimates
        squares.append(from_forward_passes(task, zo, optimizer, rows, steps))
        if every:
            found["forward"] = logged(zo)
        zo.finish()
    return found | {"gain": squares[1] / squares[0]}


def points_of(steps: int, points: int) -> list[int]:
    """Return the steps at which a run is measured: 0, and `steps` halved up to `points` − 2 times."""
    return sorted({0, *(steps >> halvings for halvings in range(points - 1))})


def train(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make one run, and return its settings and measurements."""
    torch.set_num_threads(1)
    task = Task(settings["model"], settings["loss"], settings["subspace"], settings["seed"])
    model = task.model()
    zo, optimizer = engine(
        model, settings["subspace"], settings["seed"], 1, settings["every"], settings["learning_rate"]
    )
    at, curve = points_of(settings["steps"], settings["points"]), []
    for step in tqdm(range(settings["steps"] + 1), desc=f"seed {settings['seed']}", unit="step"):
        if step in at:
            measured = measure(task, {name: p.clone() for name, p in model.state_dict().items()}, settings)
            curve.append({"step": step, "forward_passes": zo.forward_passes, "logged": logged(zo)} | measured)
        if step < settings["steps"]:
            zo.estimate(task.loss(model, task.draw(settings["batch_size"])))
            optimizer.step()
    zo.finish()
    return dict(settings) | {"curve": curve}


def runs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the settings of the requested runs."""
    for seed in args.seeds:
        yield {name: getattr(args, name) for name in SETTINGS if name != "seed"} | {"seed": seed}


def table(finished: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a row for each point: means over seeds ± their standard deviation."""
    lines = [
        "| step | loss | B_s, autograd | B_s, forward passes | `zo/noise_scale` of the run | gain from autograd's B_s "
        "| gain from forward passes' | E‖ĝ‖² of one direction / of one for every row |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for points in zip(*(run["curve"] for run in finished), strict=True):
        rows = finished[0]["batch_size"]
        columns = [
            *([point[key] for point in points] for key in ("loss", "autograd", "forward", "logged")),
            *(
                [None if point[key] is None else predicted_gain(point[key], rows) for point in points]
                for key in ("autograd", "forward")
            ),
            [point["gain"] for point in points],
        ]
        lines.append(f"| {points[0]['step']} | {' | '.join(map(spread, columns))} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float | None]) -> str:
    """Return mean ± standard deviation; a range if a value is infinite, and "-" if one is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    if math.inf in known:
        return f"{min(known):.3g} to infinite"
    return f"{mean(known):.3g}" + (f" ± {stdev(known):.2g}" if len(known) > 1 else "")


def plot(finished: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Draw B_s and the gain along the runs, a thin line for each seed, in noise-scale.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = finished[0]["batch_size"]
    for number, run in enumerate(finished):
        curve = run["curve"]
        steps = [point["step"] for point in curve]
        predicted = [predicted_gain(point["autograd"], rows) for point in curve]
        lines = (
            (left, "black", "o-", "autograd, ± its standard error", [point["autograd"] for point in curve]),
            (left, "C0", "o-", "forward passes, at the point", [point["forward"] for point in curve]),
            (left, "C1", "s--", "zo/noise_scale of the run", [point["logged"] for point in curve]),
            (right, "black", "o-", "predicted from autograd's B_s", predicted),
            (right, "C2", "o-", "E‖ĝ‖², one direction / one for every row", [point["gain"] for point in curve]),
        )
        for axes, color, style, label, values in lines:
            known = [math.nan if value is None else value for value in values]
            axes.plot(steps, known, style, color=color, linewidth=1, markersize=4, label=label if number == 0 else "")
        errors = [point["error"] for point in curve]
        left.errorbar(steps, [point["autograd"] for point in curve], errors, fmt="none", ecolor="black", capsize=3)
    left.set(xlabel="step", ylabel="B_s in rows", yscale="log")
    right.set(xlabel="step", ylabel="gain", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(folder / "noise-scale.png", dpi=130)


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    # Every copy would show its weights and report its fresh head between the lines of the run's own progress.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    report_runs(args, finished_runs(args, SETTINGS, runs(args), train), table, plot)


if __name__ == "__main__":
    with command(finished_runs_are_kept), refusals_end_the_command():
        main()
