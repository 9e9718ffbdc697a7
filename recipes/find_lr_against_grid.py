# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo]", "scikit-learn>=1.4"]
# ///
"""`learning_rate="auto"` beside a grid of learning rates, at equal forward passes, the search's own included.

    python recipes/find_lr_against_grid.py                            # the small networks; five minutes of one core
    python recipes/find_lr_against_grid.py --model path/to/model      # and two subspaces of a causal language model

The grid's rates are a factor of 3 apart. A run is plain SGD on two-point estimates with a constant rate; its seed decides the
batches, the directions, and those of the search. --output gets results.json, from which an interrupted comparison
continues, table.md and find_lr.png.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_hf import ZOConfig
from zo_hf.model_setup import make_subspace
from zo_hf.optimizers import SeededSGD
from zo_hf.stability.find_learning_rate import SHARE, FoundRate, find_learning_rate
from zo_hf.subspaces import Full
from zo_hf.zeroth_order import ZerothOrder

torch.set_num_threads(1)
BEGINNING = "before"


@dataclass
class Problem:
    """Something to train.

    Args:
        name: for people.
        rates: the grid.
        forward_passes: of a run.
        rows: of a batch.
        model: makes it, the same one every time.
        examples: how many to draw batches from.
        loss: of some examples, by number.
        score: a model's loss on a fixed set.
        options: of the subspace, as in ZOConfig.
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
        """A new model inside a new engine."""
        model = self.model()
        config = ZOConfig("unused", use_cpu=True, report_to=[], seed=seed, **self.options)
        zo = ZerothOrder(model, make_subspace(model, config, None), batched=False, seed=seed)
        subspace = zo.subspace
        if isinstance(subspace, Full):
            return zo, zo.prepare(SeededSGD(zo.coordinates(), subspace, lr=1.0))
        return zo, zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1.0))

    def batch(self, model: Any, generator: torch.Generator) -> Callable[[], Tensor]:
        """The loss of a random batch."""
        rows = torch.randperm(self.examples, generator=generator)[: self.rows].tolist()
        return lambda: self.loss(model, rows)


def digits() -> Problem:
    """A network of 4,810 weights on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def loss(model: nn.Module, rows: list[int]) -> Tensor:
        return F.cross_entropy(model(pictures[rows]), labels[rows])

    everything = list(range(len(labels)))
    rates = [1e-3, 3e-3, 1e-2, 3e-2]
    return Problem("digits", rates, 1000, 32, model, len(labels), loss, lambda m: float(loss(m, everything)))


def regression() -> Problem:
    """A network of 705 weights on numbers that are mostly noise, four at a time."""
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


def language_models(path: str) -> list[Problem]:
    """Low-rank factors of the linear layers, and the norms, learn to say the label word after a sentence."""
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
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def label(model: Any, examples: list) -> Tensor:
        inputs = LabelWordCollator(tokenizer, model)(examples)
        answers = inputs.pop("labels")[:, -1]
        return F.cross_entropy(model(**inputs).logits[:, -2].float(), answers)

    def problem(name: str, rates: list[float], options: dict[str, Any]) -> Problem:
        def score(model: Any) -> float:
            parts = [held_out[i : i + 16] for i in range(0, len(held_out), 16)]
            return sum(float(label(model, part)) for part in parts) / len(parts)

        def on_rows(model: Any, rows: list[int]) -> Tensor:
            return label(model, [train[row] for row in rows])

        return Problem(name, rates, 400, 4, model, len(train), on_rows, score, options)

    layers = {"zo_subspace": "low_rank", "zo_exclude_modules": r".*(embed|norm|lm_head).*"}
    return [
        problem("language model, low rank", [3e-7, 1e-6, 3e-6, 1e-5], layers),
        problem("language model, norms", [1e-3, 3e-3, 1e-2, 3e-2], {"zo_subspace": "norms"}),
    ]


def train(problem: Problem, rate: float | None, seed: int) -> dict[str, Any]:
    """One run; a rate of None is found. Returns the loss it ends with, and of a search what it was."""
    zo, optimizer = problem.engine(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    extra: dict[str, Any] = {}
    if rate is None:
        found = search(problem, zo, optimizer, seed)
        rate = found.learning_rate
        extra = {"rate": rate, "search": found.forward_passes, "bound": found.bound_by, "doubts": found.doubts}
        extra["factor"] = found.factor
    for group in optimizer.param_groups:
        group["lr"] = rate
    while zo.forward_passes + 2 <= problem.forward_passes:
        zo.estimate(problem.batch(zo.model, generator))
        optimizer.step()
    passes = zo.forward_passes
    with torch.no_grad():
        loss = problem.score(zo.finish())
    return {"loss": loss if math.isfinite(loss) else math.inf, "forward_passes": passes, **extra}


def search(problem: Problem, zo: ZerothOrder, optimizer: torch.optim.Optimizer, seed: int) -> FoundRate:
    """A rate for a run of the problem's forward passes."""
    generator = torch.Generator().manual_seed(2000 + seed)
    allowed, default = int(SHARE * problem.forward_passes), zo.subspace.default_learning_rate
    steps = problem.forward_passes / 2
    return find_learning_rate(
        zo, optimizer, lambda: [(problem.batch(zo.model, generator), 1.0)], allowed, steps, default
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name of a causal language model")
    parser.add_argument("--problems", nargs="+", metavar="NAME", help="some of them alone, by name")
    parser.add_argument("--forward-passes", type=int, help="of every run; default: each problem's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("out/find_lr"), help="folder for results (%(default)s)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    problems = [digits(), regression(), *(language_models(args.model) if args.model else [])]
    names = [problem.name for problem in problems]
    for name in args.problems or []:
        if name not in names:
            parser.error(f"--problems {name!r} is none of {', '.join(map(repr, names))}.")
    problems = [problem for problem in problems if not args.problems or problem.name in args.problems]
    for problem in problems:
        problem.forward_passes = args.forward_passes or problem.forward_passes
    for problem in problems:
        kept = results.setdefault(problem.name, {})
        with torch.no_grad():
            kept.setdefault(BEGINNING, {"loss": problem.score(problem.model())})
        for seed in args.seeds:
            for rate in [None, *problem.rates]:
                key = f"{'auto' if rate is None else f'{rate:g}'}, seed {seed}"
                if key not in kept:
                    kept[key] = train(problem, rate, seed)
                    path.write_text(json.dumps(results, indent=1))
                print(f"{problem.name}: {key}: {kept[key]}", flush=True)
    (args.output / "table.md").write_text("\n".join(table(problems, results, args.seeds)) + "\n")
    plot(problems, results, args.seeds, args.output / "find_lr.png")


def table(problems: list[Problem], results: dict[str, dict[str, Any]], seeds: list[int]) -> list[str]:
    """Markdown: mean losses over seeds, and whether the found rates do as well as the grid's second best."""
    lines = [
        "| problem | before | grid: rate, mean final loss | rates found | mean final loss | by seed, of the grid | passes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for problem in problems:
        kept = results[problem.name]
        grid = {rate: [kept[f"{rate:g}, seed {seed}"]["loss"] for seed in seeds] for rate in problem.rates}
        autos = [kept[f"auto, seed {seed}"] for seed in seeds]
        places = [1 + sum(losses[i] < auto["loss"] for losses in grid.values()) for i, auto in enumerate(autos)]
        means = ", ".join(f"{rate:g}: {_short(sum(losses) / len(losses))}" for rate, losses in grid.items())
        share = max(auto["search"] / auto["forward_passes"] for auto in autos)
        lines.append(
            f"| {problem.name} | {kept[BEGINNING]['loss']:.3f} | {means} | "
            f"{', '.join(format(auto['rate'], '.2g') for auto in autos)} | "
            f"{_short(sum(auto['loss'] for auto in autos) / len(autos))} | "
            f"{', '.join(f'place {place}' for place in places)} | {share:.1%} |"
        )
    return lines


def _short(loss: float) -> str:
    return f"{loss:.3f}" if loss < 100 else "diverges"


def plot(problems: list[Problem], results: dict[str, dict[str, Any]], seeds: list[int], path: Path) -> None:
    """Final loss against the rate, the found ones among the grid's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(problems), figsize=(4 * len(problems), 3.4), layout="constrained", squeeze=False
    )
    for axes, problem in zip(panels[0], problems, strict=True):
        kept = results[problem.name]
        before = kept[BEGINNING]["loss"]
        for seed in seeds:
            losses = [min(kept[f"{rate:g}, seed {seed}"]["loss"], 1.5 * before) for rate in problem.rates]
            axes.plot(problem.rates, losses, "o-", color="gray", markersize=3, linewidth=0.8)
            auto = kept[f"auto, seed {seed}"]
            axes.plot(auto["rate"], min(auto["loss"], 1.5 * before), "*", color="tab:red", markersize=11)
        axes.axhline(before, linestyle=":", color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_title(problem.name, fontsize="medium")
        axes.set_xlabel("learning rate")
    panels[0][0].set_ylabel("final loss (dotted: before training)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
