# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,private]", "scikit-learn>=1.4"]
# ///
"""Measure what differentially private training costs, and whether it hides that a row was there.

    python recipes/private_training.py membership             # digits: some minutes of one core
    python recipes/private_training.py sentences --model DIR  # reviews: some minutes with a model of 15M weights

`membership` trains a linear classifier on 100 pictures, many times with a picture that is four times as
bright and has a wrong label, and many times without.
An attacker who knows all pictures says whether it was there. One reads its final loss. The other reads the log: he replays it,
computes every picture's c at every step, and sums up how much likelier the numbers are with the picture than without. The area
under his curve (AUC) is 0.5 if he guesses, and 1 if he is always right. The same account that gives epsilon gives the largest
AUC that any attacker can reach.

`sentences` trains a language model on embedded Rotten Tomatoes sentences with more and more noise, and measures loss and
accuracy on sentences held out. The bound on c is the median |c| of sentences that are not trained on.

The results in OUTPUT are runs.jsonl, from which an interrupted comparison continues, PART.md and PART.png.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback

from zo_hf import ZerothOrder, ZOConfig, ZOTrainer
from zo_hf.comparison.finished_runs import FinishedRuns, finished_runs_are_kept
from zo_hf.evaluation.row_losses import RowLosses
from zo_hf.privacy import Guarantee, Secret
from zo_hf.privacy.accounting import default_delta
from zo_hf.privacy.poisson import PoissonSampling
from zo_hf.rng import Stream
from zo_hf.subspaces import FullInMemory
from zo_hf.tasks.assets import default_model
from zo_hf.tasks.classify import accuracy, calibrated, label_prior, label_scores
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.data import embedded_reviews
from zo_hf.tasks.prompts import PROMPT_A, LabelWordCollator, encode_example, label_token_ids
from zo_hf.tasks.refusals import refusals_end_the_command

SETTINGS = ("part", "noise", "rows_per_direction", "seed", "planted", "steps", "rows", "batch", "rate", "max_c")
#: "off" trains without privacy; 0 clips and adds no noise.
OFF = -1.0
#: Of the planted picture: a row unlike the others, as rows are that need protection.
BRIGHTNESS = 4.0


def arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", choices=PARTS, help="what to measure")
    add(
        "--noise", type=float, nargs="+", help="noise multipliers; -1 is not private, 0 clips alone (default: by part)"
    )
    add("--seeds", type=int, help="runs of each kind (default: 16 for membership, 2 for sentences)")
    add("--steps", type=int, help="steps of a run (default: 150 for membership, 40 for sentences)")
    add("--rows", type=int, help="rows to train on (default: 100 for membership, 4096 for sentences)")
    add("--batch", type=int, help="expected rows of a step (default: 20 for membership, 16 for sentences)")
    add("--rows-per-direction", type=int, nargs="+", default=[0], help="for sentences (%(default)s: one direction)")
    add("--rate", type=float, help="learning rate (default: 0.04 for membership, 3.5e-6 for sentences)")
    add("--max-c", type=float, help="bound on a row's c (default: the median |c| of rows that are held out)")
    add("--model", default=None, help="a causal language model for sentences (default: the embedded one)")
    add("--output", type=Path, default=Path("out/private_training"), help="folder for results (%(default)s)")
    args = parser.parse_args()
    for name, value in DEFAULTS[args.part].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


DEFAULTS: dict[str, dict[str, Any]] = {
    "membership": {
        "noise": [OFF, 2.0, 8.0],
        "seeds": 16,
        "steps": 150,
        "rows": 100,
        "batch": 20,
        "rate": 0.04,
    },
    "sentences": {
        "noise": [OFF, 0.5, 2.0],
        "seeds": 2,
        "steps": 40,
        "rows": 4096,
        "batch": 16,
        "rate": 3.5e-6,
    },
}


def options_of(run: dict[str, Any]) -> dict[str, Any]:
    """Return the engine's options of privacy; none for a run without it."""
    return {} if run["noise"] == OFF else {"dp_noise_multiplier": run["noise"], "dp_max_c": run["max_c"]}


def guarantee_of(run: dict[str, Any]) -> Guarantee:
    """Return the guarantee of a private run."""
    return Guarantee(run["noise"], run["rows"], run["batch"], default_delta(run["rows"]))


# Membership of a planted row.


def digits(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `rows` pictures with their labels; the last picture is the planted one, too bright and with a wrong label."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[:rows]
    pictures = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(data.target)[order]
    labels[-1] = (labels[-1] + 5) % 10
    pictures[-1] *= BRIGHTNESS
    return pictures, labels


def held_out_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return 500 pictures that no run trains on, with their labels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[-500:]
    return torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]


def train_classifier(run: dict[str, Any]) -> dict[str, float]:
    """Train on the digits with or without the planted one; return its final loss, and the others' mean loss."""
    pictures, labels = digits(run["rows"])
    secret = Secret(f"{run['seed']:031d}{int(run['planted'])}".encode())
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    seed = 2 * run["seed"] + run["planted"]
    zo = ZerothOrder(model, FullInMemory(model, seed=seed), seed=seed, **options_of(run))
    if zo.private is not None:
        zo.private.secret, zo.private.expected_rows = secret, run["batch"]
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=run["rate"]))
    sampling, evidence = PoissonSampling(secret, run["rows"], run["batch"], 1), 0.0
    for step in range(run["steps"]):
        known = slopes(zo, lambda: F.cross_entropy(model(pictures), labels, reduction="none"))
        rows = torch.from_numpy(sampling.rows_of(step))
        rows = rows[rows < len(labels) - 1 + run["planted"]]
        count = len(rows)
        rows = rows if count else torch.tensor([0])  # a row that does not count

        def losses(rows: torch.Tensor = rows, count: int = count) -> Any:
            each = F.cross_entropy(model(pictures[rows]), labels[rows], reduction="none")
            return RowLosses(each) if zo.private is not None else each.sum() * bool(count) / run["batch"]

        if zo.private is not None:
            zo.private.part_of = lambda *_, count=count: (0, count)
        (number,) = zo.estimate(losses).projected_gradients
        evidence += evidence_of(number * run["batch"], known, run)
        optimizer.step()
    others, answers = held_out_digits()
    with torch.no_grad():
        each = F.cross_entropy(model(pictures), labels, reduction="none")
        right = (model(others).argmax(1) == answers).float().mean()
    losses_of = {"planted_loss": float(each[-1]), "loss": float(each[:-1].mean())}
    return losses_of | {"accuracy": float(right), "evidence": evidence}


def slopes(zo: ZerothOrder, losses: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return c of every row in the step that begins, float64 (rows,), as whoever replays the log can compute it."""
    found = []
    for probe in zo.estimator.probes():
        with torch.no_grad(), zo.subspace.at((probe,), lambda i: Stream(zo.seed, zo.step, i), zo.distribution):
            found.append(losses().double())
    return (found[0] - found[1]) / (2 * zo.estimator.eps)


def evidence_of(total: float, known: torch.Tensor, run: dict[str, Any]) -> float:
    """Return the logarithm of how much likelier a step's number is with the planted row, the last, than without.

    The attacker knows every row and its c, but not which rows the step has drawn: to him their sum is about normal.
    """
    rate = run["batch"] / run["rows"]
    if run["noise"] != OFF:
        known = known.clamp(-run["max_c"], run["max_c"])
    others, planted = known[:-1], float(known[-1])
    variance = rate * (1 - rate) * float(others.square().sum()) + (max(run["noise"], 0.0) * run["max_c"]) ** 2
    distance = total - rate * float(others.sum())
    moved = (distance * planted - planted * planted / 2) / max(variance, 1e-12)
    return float(torch.logaddexp(torch.tensor(math.log(1 - rate)), torch.tensor(math.log(rate) + moved)))


def usual_c_of_digits(args: argparse.Namespace) -> float:
    """Return the median |c| of pictures that no run trains on, at the start."""
    pictures, labels = held_out_digits()
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return usual_c(
        model, "full", [lambda i=i: F.cross_entropy(model(pictures[i : i + 1]), labels[i : i + 1]) for i in range(100)]
    )


def usual_c(model: nn.Module, subspace: str, losses: list[Callable[[], Any]], **options: Any) -> float:
    """Return the median |c| of some rows, each along a direction of its own; the model stays as it is."""
    found = []
    for number, loss in enumerate(losses):
        zo = ZerothOrder(model, subspace, seed=number, **options)
        found.append(abs(zo.estimate(loss).projected_gradients[0]))
        zo.discard()
        zo.subspace.clear_gradient()
        zo.finish()
    return float(f"{median(found):.2g}")


def best_auc(guarantee: Guarantee, steps: int) -> float:
    """Return the largest AUC that any attack can have, from the account's δ at every ε."""
    largest = guarantee.epsilon(steps)
    curve = guarantee.curve(steps, [largest * i / 40 for i in range(41)])
    wrong = [i / 1000 for i in range(1001)]  # false alarms
    # Every (ε, δ) bounds what an attack misses at a rate of false alarms (Wasserman and Zhou 2010).
    missed = [max(max(0.0, 1 - d - math.exp(e) * a, math.exp(-e) * (1 - d - a)) for e, d in curve) for a in wrong]
    return 1 - sum((a + b) / 2 for a, b in zip(missed[1:], missed[:-1], strict=True)) / 1000


def spread_of(auc: float, count: int) -> float:
    """Return the standard error of an AUC over `count` runs of each kind (Hanley and McNeil 1982)."""
    q1, q2 = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    return math.sqrt((auc * (1 - auc) + (count - 1) * (q1 + q2 - 2 * auc * auc)) / count / count)


def membership(args: argparse.Namespace, finished: FinishedRuns) -> list[dict[str, Any]]:
    """Make the missing runs; return a line of the table for every amount of noise."""
    max_c = args.max_c or usual_c_of_digits(args)
    lines = []
    for noise in args.noise:
        runs = [
            settings(args, noise, 0, seed, planted, max_c) for seed in range(args.seeds) for planted in (False, True)
        ]
        made = [
            finished.found_or_made(run, partial(train_classifier, run))
            for run in tqdm(runs, desc=f"noise {noise:g}", unit="run")
        ]
        there = [run["planted"] for run in made]
        guarantee = guarantee_of(made[0]) if noise > 0 else None
        auc = {
            name: float(roc_auc_score(there, [sign * run[score] for run in made]))
            for name, score, sign in (("AUC by loss", "planted_loss", -1), ("AUC by log", "evidence", 1))
        }
        lines.append(
            {
                "noise": noise,
                "epsilon": math.inf if guarantee is None else guarantee.epsilon(args.steps),
                **auc,
                "error": spread_of(auc["AUC by log"], args.seeds),
                "largest AUC": 1.0 if guarantee is None else best_auc(guarantee, args.steps),
                "loss": mean(run["loss"] for run in made),
                "held-out accuracy": mean(run["accuracy"] for run in made),
                "planted loss, with": mean(run["planted_loss"] for run in made if run["planted"]),
                "planted loss, without": mean(run["planted_loss"] for run in made if not run["planted"]),
            }
        )
    return lines


# Sentences.


def train_sentences(run: dict[str, Any], task: SentenceTask) -> dict[str, float]:
    """Train the language model; return loss and accuracy on held-out sentences, and the processor time."""
    model = task.load()
    private = {f"zo_{name}": value for name, value in options_of(run).items()}
    with tempfile.TemporaryDirectory() as folder:
        config = ZOConfig(
            folder,
            seed=run["seed"],
            learning_rate=run["rate"],
            max_steps=run["steps"],
            per_device_train_batch_size=run["batch"],
            zo_rows_per_direction=run["rows_per_direction"],
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            **task.options,
            **private,
        )
        collator = LabelWordCollator(task.tokenizer, model)
        trainer = ZOTrainer(model, config, train_dataset=task.encoded, data_collator=collator)
        trainer.remove_callback(PrinterCallback)
        started = time.process_time()
        trainer.train()
    return task.score(model) | {"seconds": time.process_time() - started}


class SentenceTask:
    """The model, the sentences and the prompt."""

    options: dict[str, Any] = {"zo_subspace": "low_rank", "zo_exclude_modules": r".*(embed|norm).*"}

    def __init__(self, args: argparse.Namespace) -> None:
        self._name = str(default_model()) if args.model is None else args.model
        self.tokenizer = AutoTokenizer.from_pretrained(self._name)
        sentences = embedded_reviews(args.rows, 400, 0, range(4, 13))
        self.rows, self.held_out = len(sentences.train), sentences.held_out
        self.encoded = self._encode(sentences.train)

    def _encode(self, rows: Dataset) -> Dataset:
        labels = label_token_ids(self.tokenizer, PROMPT_A)
        return Dataset.from_list(
            [encode_example(self.tokenizer, PROMPT_A, row["text"], labels[row["label"]], 64) for row in rows]
        )

    def load(self) -> Any:
        """Load the model in float32."""
        model = AutoModelForCausalLM.from_pretrained(self._name, dtype=torch.float32)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def score(self, model: Any) -> dict[str, float]:
        """Return the loss of the label word and the accuracy on held-out sentences."""
        texts, labels = self.held_out["text"][:], self.held_out["label"][:]
        scores = label_scores(model, self.tokenizer, texts, PROMPT_A, 32, 64)
        prior = label_prior(model, self.tokenizer, PROMPT_A)
        return {
            "loss": float(F.nll_loss(scores, torch.tensor(labels))),
            "accuracy": accuracy(calibrated(scores, prior), labels),
        }

    def usual_c(self) -> float:
        """Return the median |c| of held-out sentences, at the start."""
        model = self.load()
        collate = LabelWordCollator(self.tokenizer, model)
        rows = self._encode(self.held_out.select(range(32)))
        batches = [collate([row]) for row in rows]
        batches = [{k: v.to(model.device) if torch.is_tensor(v) else v for k, v in b.items()} for b in batches]
        exclude = self.options["zo_exclude_modules"]
        return usual_c(model, "low_rank", [lambda b=b: model(**b).loss for b in batches], exclude_modules=exclude)


def sentences(args: argparse.Namespace, finished: FinishedRuns) -> list[dict[str, Any]]:
    """Make the missing runs; return a line of the table for every amount of noise."""
    task = SentenceTask(args)
    args.rows = task.rows
    max_c = args.max_c or task.usual_c()
    before = task.score(task.load())
    lines = [{"noise": "untrained", "rows a direction": "", "C": "", "epsilon": 0.0, **before}]
    for rows_per_direction in args.rows_per_direction:
        for noise in args.noise:
            runs = [settings(args, noise, rows_per_direction, seed, False, max_c) for seed in range(args.seeds)]
            made = [
                finished.found_or_made(run, partial(train_sentences, run, task))
                for run in tqdm(runs, desc=f"noise {noise:g}")
            ]
            lines.append(
                {
                    "noise": noise,
                    "rows a direction": rows_per_direction or "all",
                    "C": "" if noise == OFF else max_c,
                    "epsilon": guarantee_of(made[0]).epsilon(args.steps) if noise > 0 else math.inf,
                    "loss": mean(run["loss"] for run in made),
                    "accuracy": mean(run["accuracy"] for run in made),
                    "losses": ", ".join(f"{run['loss']:.2f}" for run in made),
                }
            )
    return lines


PARTS: dict[str, Callable[[argparse.Namespace, FinishedRuns], list[dict[str, Any]]]] = {
    "membership": membership,
    "sentences": sentences,
}


def settings(
    args: argparse.Namespace, noise: float, rows_per_direction: int, seed: int, planted: bool, max_c: float
) -> dict[str, Any]:
    """Return the settings that identify a run."""
    values = (args.part, noise, rows_per_direction, seed, planted, args.steps, args.rows, args.batch, args.rate, max_c)
    return dict(zip(SETTINGS, values, strict=True))


def table(lines: list[dict[str, Any]]) -> str:
    """Return the lines as a table."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    rows = [[_cell(line.get(name, "")) for name in names] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in [names, ["---"] * len(names), *rows]) + "\n"


def _cell(value: Any) -> str:
    if value == OFF:
        return "not private"
    if value == math.inf:
        return "∞"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def plot(part: str, lines: list[dict[str, Any]], path: Path) -> None:
    """Draw AUC, or loss, against epsilon."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    y = "AUC by log" if part == "membership" else "loss"
    kinds = list(
        dict.fromkeys(line.get("rows a direction", "") for line in lines if line["noise"] not in ("untrained",))
    )
    for kind in kinds:
        of = [line for line in lines if line.get("rows a direction", "") == kind]
        private = sorted(
            (line["epsilon"], line[y], line.get("error", 0.0)) for line in of if 0 < line["epsilon"] < math.inf
        )
        label = "private" if part == "membership" else f"private, {kind} rows a direction"
        drawn = axes.errorbar(*zip(*private, strict=True), marker="o", capsize=3, label=label)
        for line in of:
            if line["epsilon"] == math.inf:
                name, style = ("not private", ":") if line["noise"] == OFF else ("clipped, without noise", "--")
                axes.axhline(line[y], linestyle=style, color=drawn[0].get_color(), label=name)
    if part == "membership":
        bound = sorted((line["epsilon"], line["largest AUC"]) for line in lines if line["epsilon"] < math.inf)
        axes.plot(*zip(*bound, strict=True), color="gray", label="the largest of any attack")
        axes.axhline(0.5, color="lightgray", label="guessing")
    axes.set_xscale("log")
    axes.set_xlabel("ε")
    axes.set_ylabel("AUC of the attack" if part == "membership" else "held-out loss")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    args = arguments()
    finished = FinishedRuns(args.output / "runs.jsonl", SETTINGS)
    lines = PARTS[args.part](args, finished)
    (args.output / f"{args.part}.md").write_text(table(lines), encoding="utf-8")
    print(table(lines))
    plot(args.part, lines, args.output / f"{args.part}.png")


if __name__ == "__main__":
    with command(finished_runs_are_kept), refusals_end_the_command():
        main()
