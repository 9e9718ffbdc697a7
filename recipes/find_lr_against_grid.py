# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo]", "peft", "scikit-learn>=1.4"]
# ///
"""Compare `learning_rate="auto"` with a grid of learning rates, at equal forward passes including those of the search.

    python recipes/find_lr_against_grid.py                            # the small networks; eight minutes of one core
    python recipes/find_lr_against_grid.py --model path/to/model      # and three subspaces of a causal language model

The rates of the grid are a factor of 3 apart. A run is plain SGD on two-point estimates with a constant rate. Its seed
determines the batches and the directions, also those of the search. The results in --output are runs.jsonl, from which
an interrupted comparison continues, table.md and find_lr.png.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_hf import ZOConfig
from zo_hf.comparison.finished_runs import FinishedRuns, finished_runs_are_kept
from zo_hf.engine import ZerothOrder
from zo_hf.lr_finder.find import SHARE, LRFinderResult, find_learning_rate, forward_passes_of_search
from zo_hf.rules import SeededSGD
from zo_hf.subspaces import Full
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.refusals import refusals_end_the_command

SETTINGS = ("problem", "forward_passes", "rate", "seed")
#: Values in place of a rate: no training, and a rate from the LR finder.
BEFORE, AUTO = "before", "auto"


@dataclass
class Problem:
    """A training problem.

    Args:
        name: the name for display.
        rates: the grid of learning rates.
        forward_passes: number of forward passes of a run.
        rows: rows of a batch.
        model: creates the model, the same every time.
        examples: number of training examples.
        loss: returns a model's loss on the examples with the given indices.
        score: returns a model's loss on a fixed set.
        options: options of ZOConfig for the subspace.
    """

    name: str
    rates: list[float]
    forward_passes: int
    rows: int
    model: Callable[[], Any]
    examples: int
    loss: Callable[[Any, list[int]], Tensor]
    score: Callable[[Any], float]
    options: dict[str, Any] = field(default_factory=lambda: {"zo_subspace": "full"})

    def engine(self, seed: int) -> tuple[ZerothOrder, torch.optim.Optimizer]:
        """Return a new engine for a new model, and its optimizer."""
        model = self.model()
        config = ZOConfig("unused", use_cpu=True, report_to=[], seed=seed, **self.options)
        zo = ZerothOrder(model, config.settings().make_subspace(model), batched_probes=False, seed=seed)
        subspace = zo.subspace
        if isinstance(subspace, Full):
            return zo, zo.prepare(SeededSGD(zo.coordinates(), subspace, lr=1.0))
        return zo, zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1.0))

    def batch(self, model: Any, generator: torch.Generator) -> Callable[[], Tensor]:
        """Return a function that evaluates the loss of a random batch."""
        rows = torch.randperm(self.examples, generator=generator)[: self.rows].tolist()
        return lambda: self.loss(model, rows)


def _pictures(name: str, rates: list[float], make: Callable[[], nn.Module]) -> Problem:
    """Return the problem of training a network on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return make()

    def loss(model: nn.Module, rows: list[int]) -> Tensor:
        return F.cross_entropy(model(pictures[rows]), labels[rows])

    everything = list(range(len(labels)))
    return Problem(name, rates, 1000, 32, model, len(labels), loss, lambda m: float(loss(m, everything)))


def digits() -> Problem:
    """Return a problem with a network of 4,810 weights on pictures."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    return _pictures("digits", [1e-3, 3e-3, 1e-2, 3e-2], make)


def convolution() -> Problem:
    """Return a problem with a convolutional network of 3,314 weights on pictures."""

    def make() -> nn.Module:
        shape, first, second = nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 16, 3)
        pooled = nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 10)
        return nn.Sequential(shape, first, nn.ReLU(), second, *pooled)

    return _pictures("convolution", [3e-4, 1e-3, 3e-3, 1e-2], make)


def regression() -> Problem:
    """Return a problem with a network of 705 weights on very noisy data, in batches of four."""
    generator = torch.Generator().manual_seed(0)
    inputs, weights = torch.randn(2000, 20, generator=generator), torch.randn(20, generator=generator)
    outputs = torch.sin(inputs @ weights / 20**0.5) + torch.randn(2000, generator=generator)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 1))

    def loss(model: nn.Module, rows: list[int]) -> Tensor:
        return F.mse_loss(model(inputs[rows]).squeeze(1), outputs[rows])

    everything = list(range(len(outputs)))
    rates = [1e-4, 3e-4, 1e-3, 3e-3]
    return Problem("noisy regression", rates, 1000, 4, model, len(outputs), loss, lambda m: float(loss(m, everything)))


def _language_model(path: str, name: str, rates: list[float], options: dict[str, Any], lora: int = 0) -> Problem:
    """Return the problem of training a causal language model to predict the label word after a sentence."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from zo_hf.tasks.data import embedded_reviews
    from zo_hf.tasks.prompts import PROMPT_A, LabelWordCollator, encode_example, label_token_ids

    tokenizer = AutoTokenizer.from_pretrained(path)
    sentences = embedded_reviews(1000, 160, 0, range(4, 9))
    ids = label_token_ids(tokenizer, PROMPT_A)

    def encode(rows: Any) -> list:
        return [encode_example(tokenizer, PROMPT_A, row["text"], ids[row["label"]], 64) for row in rows]

    train, held_out = encode(sentences.train), encode(sentences.held_out)

    def model() -> Any:
        plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        if not lora:
            return plain
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        return get_peft_model(plain, LoraConfig(r=lora, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])).eval()

    def label(model: Any, examples: list) -> Tensor:
        inputs = LabelWordCollator(tokenizer, model)(examples)
        answers = inputs.pop("labels")[:, -1]
        return F.cross_entropy(model(**inputs).logits[:, -2].float(), answers)

    def score(model: Any) -> float:
        parts = [held_out[i : i + 16] for i in range(0, len(held_out), 16)]
        return sum(float(label(model, part)) for part in parts) / len(parts)

    def on_rows(model: Any, rows: list[int]) -> Tensor:
        return label(model, [train[row] for row in rows])

    return Problem(name, rates, 400, 4, model, len(train), on_rows, score, options)


def low_rank(path: str) -> Problem:
    """Return a problem that moves low-rank factors of the linear layers."""
    options = {"zo_subspace": "low_rank", "zo_exclude_modules": r".*(embed|norm|lm_head).*"}
    return _language_model(path, "language model, low rank", [3e-7, 1e-6, 3e-6, 1e-5], options)


def norms(path: str) -> Problem:
    """Return a problem that moves the parameters of one dimension."""
    return _language_model(path, "language model, norms", [1e-3, 3e-3, 1e-2, 3e-2], {"zo_subspace": "norms"})


def lora(path: str) -> Problem:
    """Return a problem that moves a LoRA adapter of rank 8."""
    return _language_model(path, "language model, LoRA", [1e-3, 3e-3, 1e-2, 3e-2], {"zo_subspace": "adapter"}, lora=8)


SMALL: dict[str, Callable[[], Problem]] = {
    "digits": digits,
    "noisy regression": regression,
    "convolution": convolution,
}
OF_A_LANGUAGE_MODEL = {
    "language model, low rank": low_rank,
    "language model, norms": norms,
    "language model, LoRA": lora,
}


def train(problem: Problem, rate: float | str, seed: int) -> dict[str, Any]:
    """Make one run, and return its final loss, its forward passes and the result of a search."""
    zo, optimizer = problem.engine(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    extra: dict[str, Any] = {}
    if rate == AUTO:
        result = search(problem, zo, optimizer, seed)
        rate = result.learning_rate
        extra = {"found": rate, "search": result.forward_passes, "factor": result.factor, "warnings": result.warnings}
    for group in optimizer.param_groups:
        group["lr"] = rate
    while zo.forward_passes + 2 <= problem.forward_passes:
        zo.estimate(problem.batch(zo.model, generator))
        optimizer.step()
    passes = zo.forward_passes
    with torch.no_grad():
        loss = problem.score(zo.finish())
    return {"loss": loss if math.isfinite(loss) else math.inf, "taken": passes, **extra}


def search(problem: Problem, zo: ZerothOrder, optimizer: torch.optim.Optimizer, seed: int) -> LRFinderResult:
    """Search a learning rate for a run with the problem's number of forward passes."""
    generator = torch.Generator().manual_seed(2000 + seed)
    allowed, default = int(SHARE * problem.forward_passes), zo.subspace.default_learning_rate
    steps = (problem.forward_passes - forward_passes_of_search(allowed, 1)) / 2
    return find_learning_rate(
        zo, optimizer, lambda: [(problem.batch(zo.model, generator), 1.0)], allowed, steps, default
    )


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", help="folder or name of a causal language model")
    parser.add_argument("--problems", nargs="+", metavar="NAME", help="names of the problems; default: all")
    parser.add_argument(
        "--forward-passes", type=int, help="forward passes of a run; default: the problem's own number"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/find_lr"), help="folder for results (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    makers = dict(SMALL)
    if args.model:
        makers |= {name: partial(make, args.model) for name, make in OF_A_LANGUAGE_MODEL.items()}
    for name in args.problems or []:
        if name not in makers:
            parser.error(f"--problems {name!r} is unknown; choose among {', '.join(map(repr, makers))}.")
    problems = [make() for name, make in makers.items() if name in (args.problems or makers)]
    finished = FinishedRuns(args.output / "runs.jsonl", SETTINGS)
    for problem in problems:
        problem.forward_passes = args.forward_passes or problem.forward_passes
        runs = [(rate, seed) for seed in args.seeds for rate in (AUTO, *problem.rates)]
        for rate, seed in [(BEFORE, args.seeds[0]), *runs]:
            settings = dict(zip(SETTINGS, (problem.name, problem.forward_passes, rate, seed), strict=True))
            make = partial(before, problem) if rate == BEFORE else partial(train, problem, rate, seed)
            run = finished.found_or_made(settings, make)
            print(*(f"{name}={value}" for name, value in run.items()), flush=True)
    (args.output / "table.md").write_text("\n".join(table(problems, finished, args.seeds)) + "\n")
    plot(problems, finished, args.seeds, args.output / "find_lr.png")


def before(problem: Problem) -> dict[str, Any]:
    """Return the initial loss of a run."""
    with torch.no_grad():
        return {"loss": problem.score(problem.model())}


def finished_run(problem: Problem, finished: FinishedRuns, rate: float | str, seed: int) -> dict[str, Any]:
    """Return a finished run."""
    run = finished.find(dict(zip(SETTINGS, (problem.name, problem.forward_passes, rate, seed), strict=True)))
    assert run is not None
    return run


def table(problems: list[Problem], finished: FinishedRuns, seeds: list[int]) -> list[str]:
    """Return a Markdown table of mean losses over seeds, with the place of "auto" among the rates of the grid."""
    lines = [
        "| problem | before | grid: rate, mean final loss | rates found | mean final loss | place | by seed | passes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for problem in problems:
        grid = {
            rate: [finished_run(problem, finished, rate, seed)["loss"] for seed in seeds] for rate in problem.rates
        }
        autos = [finished_run(problem, finished, AUTO, seed) for seed in seeds]
        mean = sum(auto["loss"] for auto in autos) / len(autos)
        place = 1 + sum(sum(losses) / len(losses) < mean for losses in grid.values())
        places = [1 + sum(losses[i] < auto["loss"] for losses in grid.values()) for i, auto in enumerate(autos)]
        means = ", ".join(f"{rate:g}: {_short(sum(losses) / len(losses))}" for rate, losses in grid.items())
        share = max(auto["search"] / auto["taken"] for auto in autos)
        lines.append(
            f"| {problem.name} | {finished_run(problem, finished, BEFORE, seeds[0])['loss']:.3f} | {means} | "
            f"{', '.join(format(auto['found'], '.2g') for auto in autos)} | {_short(mean)} | {place} | "
            f"{', '.join(map(str, places))} | {share:.1%} |"
        )
    return lines


def _short(loss: float) -> str:
    return f"{loss:.3f}" if loss < 100 else "diverges"


def plot(problems: list[Problem], finished: FinishedRuns, seeds: list[int], path: Path) -> None:
    """Draw the final loss against the learning rate, for the grid and for "auto"."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(problems), 3)
    rows = -(-len(problems) // columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3.4 * rows), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(problems) :]:
        axes.set_visible(False)
    for axes, problem in zip(panels.flat, problems, strict=False):
        first = finished_run(problem, finished, BEFORE, seeds[0])["loss"]
        for seed in seeds:
            losses = [min(finished_run(problem, finished, rate, seed)["loss"], 1.5 * first) for rate in problem.rates]
            axes.plot(problem.rates, losses, "o-", color="gray", markersize=3, linewidth=0.8)
            auto = finished_run(problem, finished, AUTO, seed)
            axes.plot(auto["found"], min(auto["loss"], 1.5 * first), "*", color="tab:red", markersize=11)
        axes.axhline(first, linestyle=":", color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_title(problem.name, fontsize="medium")
        axes.set_xlabel("learning rate")
    for axes in panels[:, 0]:
        axes.set_ylabel("final loss (dotted: before training)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    with command(finished_runs_are_kept), refusals_end_the_command():
        main()
