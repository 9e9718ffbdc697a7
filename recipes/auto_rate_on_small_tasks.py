# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf", "peft", "matplotlib"]
# ///
"""Run `learning_rate="auto"` on four tasks that tiny models learn from the start, in three subspaces.

    python recipes/auto_rate_on_small_tasks.py                                   # about ten minutes of one core
    python recipes/auto_rate_on_small_tasks.py --before out/older/runs.jsonl     # beside the runs of another version

Every model is a small Transformer with random weights, so no file is needed. The loss is that of all training rows, before
and after. The results in --output are runs.jsonl, from which an interrupted comparison continues, table.md and
auto_rate.png.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

from zo_hf import ZOConfig, ZOTrainer
from zo_hf.comparison.finished_runs import FinishedRuns, finished_runs_are_kept
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.data import embedded_reviews
from zo_hf.tasks.refusals import refusals_end_the_command

SETTINGS = ("task", "subspace", "seed", "steps")
SUBSPACES = ("low_rank", "full", "lora")
SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
Rows = list[dict[str, torch.Tensor]]


def _rows(ids: torch.Tensor, labels: torch.Tensor) -> Rows:
    mask = torch.ones_like(ids[0])
    return [{"input_ids": x, "labels": y, "attention_mask": mask} for x, y in zip(ids, labels, strict=True)]


def facts(random: torch.Generator) -> tuple[Any, Rows]:
    """Four questions, each with an answer of two tokens, and every row eight times."""
    ids = torch.randint(3, 64, (4, 8), generator=random)
    labels = ids.clone()
    labels[:, :-2] = -100
    config = Qwen2Config(**SIZE | {"initializer_range": 0.2, "tie_word_embeddings": True})
    return Qwen2ForCausalLM(config), _rows(ids, labels) * 8


def random_labels(random: torch.Generator) -> tuple[Any, Rows]:
    """Sixteen rows of random tokens, to be learned by heart."""
    ids = torch.randint(3, 64, (16, 12), generator=random)
    return LlamaForCausalLM(LlamaConfig(**SIZE | {"initializer_range": 0.1})), _rows(ids, ids)


def classification(random: torch.Generator) -> tuple[Any, Rows]:
    """Rows of random tokens in two classes: is the first token larger than the second?"""
    ids = torch.randint(3, 64, (256, 10), generator=random)
    config = LlamaConfig(**SIZE | {"initializer_range": 0.1, "num_labels": 2})
    return LlamaForSequenceClassification(config), _rows(ids, (ids[:, 0] > ids[:, 1]).long())


def reviews(random: torch.Generator) -> tuple[Any, Rows]:
    """Sentences of movie reviews and their sentiment, with every word hashed to one of 60 tokens."""
    data = embedded_reviews(256, 1, 0, range(4, 9)).train
    words = [[3 + zlib.crc32(word.encode()) % 61 for word in row["text"].split()] for row in data]
    ids = torch.tensor([[0] * (8 - len(row)) + row for row in words])
    config = LlamaConfig(**SIZE | {"initializer_range": 0.1, "num_labels": 2})
    return LlamaForSequenceClassification(config), _rows(ids, torch.tensor(data["label"]))


TASKS: dict[str, Callable[[torch.Generator], tuple[Any, Rows]]] = {
    "facts": facts,
    "random labels": random_labels,
    "classification": classification,
    "reviews": reviews,
}


def mean_loss(model: Any, rows: Rows) -> float:
    """Return the loss of all rows."""
    with torch.no_grad():
        return float(model.eval()(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss)


def train(task: str, subspace: str, seed: int, steps: int) -> dict[str, Any]:
    """Make one run, and return its losses, its rate and the number of warnings."""
    torch.manual_seed(0)
    model, rows = TASKS[task](torch.Generator().manual_seed(7))
    model.eval()
    if subspace == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]))
    before = mean_loss(model, rows)
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("zo_hf").addHandler(handler)
    with tempfile.TemporaryDirectory() as folder:
        config = ZOConfig(
            folder,
            learning_rate="auto",
            max_steps=steps,
            zo_rows_per_direction=0,
            per_device_train_batch_size=8,
            zo_subspace="adapter" if subspace == "lora" else subspace,
            seed=seed,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=steps,
        )
        trainer = ZOTrainer(model, config, train_dataset=rows)
        trainer.train()
    logging.getLogger("zo_hf").removeHandler(handler)
    result = trainer.found_learning_rate
    assert result is not None
    after = mean_loss(trainer.model, rows)
    return {
        "before": before,
        "after": after if math.isfinite(after) else math.inf,
        "rate": result.learning_rate,
        "search": result.forward_passes,
        "doubts": len(result.warnings),
        "lowered": sum("so the rate is divided" in message for message in messages),
    }


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="steps of a run (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs (%(default)s)")
    parser.add_argument("--before", type=Path, help="runs.jsonl of another version, to compare with")
    parser.add_argument("--output", type=Path, default=Path("out/auto_rate"), help="folder for results (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    finished = FinishedRuns(args.output / "runs.jsonl", SETTINGS)
    # By seeds first, so that an interrupted comparison has something of everything.
    for seed in args.seeds:
        for task in TASKS:
            for subspace in SUBSPACES:
                settings = dict(zip(SETTINGS, (task, subspace, seed, args.steps), strict=True))
                run = finished.found_or_made(settings, partial(train, task, subspace, seed, args.steps))
                print(*(f"{name}={value}" for name, value in run.items()), flush=True)
    older = FinishedRuns(args.before, SETTINGS, only_read=True) if args.before else None
    (args.output / "table.md").write_text("\n".join(table(finished, older, args)) + "\n")
    plot(finished, older, args, args.output / "auto_rate.png")


def runs_of(finished: FinishedRuns, task: str, subspace: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the finished runs of a task in a subspace, by seed."""
    found = [
        finished.find(dict(zip(SETTINGS, (task, subspace, seed, args.steps), strict=True))) for seed in args.seeds
    ]
    return [run for run in found if run is not None]


def table(finished: FinishedRuns, older: FinishedRuns | None, args: argparse.Namespace) -> list[str]:
    """Return a Markdown table of the losses before and after."""
    lines = [
        "| task | subspace | loss before | loss after | rates found | times lowered |"
        + (" other version: loss after | its rates |" if older else ""),
        "| --- " * (8 if older else 6) + "|",
    ]
    for task in TASKS:
        for subspace in SUBSPACES:
            runs = runs_of(finished, task, subspace, args)
            row = f"| {task} | {subspace} | {runs[0]['before']:.2f} | {_losses(runs)} | {_rates(runs)} | "
            row += ", ".join(str(run["lowered"]) for run in runs) + " |"
            if older:
                others = runs_of(older, task, subspace, args)
                row += f" {_losses(others)} | {_rates(others)} |"
            lines.append(row)
    return lines


def _losses(runs: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{run['after']:.2f}" if run["after"] <= run["before"] else f"**{run['after']:.3g}**" for run in runs
    )


def _rates(runs: list[dict[str, Any]]) -> str:
    return ", ".join(f"{run['rate']:.1e}" for run in runs)


def plot(finished: FinishedRuns, older: FinishedRuns | None, args: argparse.Namespace, path: Path) -> None:
    """Draw the final losses as fractions of the first ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    names = [(task, subspace) for task in TASKS for subspace in SUBSPACES]
    for source, color, shift, label in ((older, "gray", -0.15, "other version"), (finished, "tab:red", 0.15, "now")):
        if source is None:
            continue
        points = [
            (place + shift, min(run["after"] / run["before"], 10.0))
            for place, name in enumerate(names)
            for run in runs_of(source, *name, args)
        ]
        axes.plot(*zip(*points, strict=True), "o", color=color, markersize=4, label=label)
    axes.axhline(1.0, color="black", linestyle=":", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), [f"{task}\n{subspace}" for task, subspace in names], fontsize=6)
    axes.set_ylabel("loss after / before (at most 10)")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    with command(finished_runs_are_kept), refusals_end_the_command():
        main()
