# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo]"]
# ///
"""Fit a classification head to the features of a pretrained model on every task of the suite, by forward passes.

    python recipes/fitted_heads.py                                     # SmolLM2-135M, embedded; half an hour of one core
    python recipes/fitted_heads.py --model MODEL --tasks questions entailment

Every task is put to the model in three ways: by its label words after a prompt, without any training; by a head that
zo_hf.fit_head fits to the bare texts; and by one that it fits to the texts in the prompt. An encoder has only the
second. `--demo-seeds` adds the sentences on which the demo trains and tests with these seeds.

The results in OUTPUT are runs.jsonl, a line for each finished run from which an interrupted comparison continues, and
table.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.finished import FILE
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

from zo_hf import fit_head
from zo_hf.cli.evaluate_methods import alignments_of
from zo_hf.comparison.finished_runs import FinishedRuns, finished_runs_are_kept
from zo_hf.comparison.subject import parts_of_task
from zo_hf.comparison.suite import OFFLINE, TASKS, Sizes
from zo_hf.tasks.assets import default_model
from zo_hf.tasks.classify import accuracy, majority_accuracy, next_token_scores
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.data import embedded_reviews
from zo_hf.tasks.prompts import encode_prompt, label_token_ids
from zo_hf.tasks.refusals import refusals_end_the_command
from zo_hf.trainer.output_paths import check_folder

SETTINGS = ("model", "problem", "way", "train_rows", "eval_rows", "max_words", "batch_size")
WAYS = {"words": "label words, untrained", "bare": "fitted head, bare text", "prompt": "fitted head, in the prompt"}
DEMO_TASK = "sentiment"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--model", help="a model of text, a folder or a name; default: the embedded SmolLM2-135M")
    add("--tasks", nargs="*", choices=OFFLINE, default=list(OFFLINE), help="tasks of the suite (all without a hub)")
    add("--demo-seeds", nargs="*", type=int, default=[], help="seeds of the demo, whose sentences are added (none)")
    add("--train-rows", type=int, default=1000, help="rows that the head is fitted to (%(default)s)")
    add("--eval-rows", type=int, default=400, help="rows that are scored (%(default)s)")
    add("--max-words", type=int, default=12, help="maximum number of words in a text of the suite (%(default)s)")
    add("--batch-size", type=int, default=16, help="rows in a forward pass (%(default)s)")
    add("--output", type=Path, default=Path("out/fitted_heads"), help="folder for results (%(default)s)")
    args = parser.parse_args(words)
    args.model = args.model or str(default_model())
    return args


def wanted(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the settings of every run."""
    ways = list(WAYS) if "prompt" in alignments_of(args.model, None) else ["bare"]
    for problem in [*args.tasks, *(f"demo, seed {seed}" for seed in args.demo_seeds)]:
        for way in ways:
            yield {name: getattr(args, name, None) for name in SETTINGS} | {"problem": problem, "way": way}


def rows_of(settings: Mapping[str, Any]) -> tuple[str, Dataset, Dataset]:
    """Return the task of a run, and its rows for training and for the test, with `text`, `pair` and `label`."""
    problem, train, held_out = settings["problem"], settings["train_rows"], settings["eval_rows"]
    if problem in TASKS:
        parts = parts_of_task(problem, Sizes(train, held_out, settings["max_words"]))
        return problem, parts.train, parts.test
    reviews = embedded_reviews(train, held_out, int(problem.rpartition(" ")[2]))
    return DEMO_TASK, *(part.add_column("pair", [""] * len(part)) for part in (reviews.train, reviews.held_out))


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run with its accuracies and the forward passes that the fit took."""
    task_name, train, test = rows_of(settings)
    task, batch_size, model_name = TASKS[task_name], settings["batch_size"], settings["model"]
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    longest = 8 * task.max_tokens(settings["max_words"])
    labels = test["label"][:]

    def asked(rows: Dataset) -> list[list[int]]:
        return [encode_prompt(tokenizer, task.prompt(row["pair"]), row["text"], longest) for row in rows]

    if settings["way"] == "words":
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()
        ids = label_token_ids(tokenizer, task.prompt())
        found = {
            "passes": 0,
            "accuracy": accuracy(next_token_scores(model, tokenizer, asked(test), ids, batch_size), labels),
        }
        return dict(settings) | found | {"majority": majority_accuracy(labels)}

    def bare(rows: Dataset) -> list[list[int]]:
        texts = [(row["text"], row["pair"]) if row["pair"] else (row["text"],) for row in rows]
        return [tokenizer(*pair, truncation="longest_first", max_length=longest)["input_ids"] for pair in texts]

    encode = asked if settings["way"] == "prompt" else bare
    model = AutoModelForSequenceClassification.from_pretrained(
        model_name, dtype=torch.float32, num_labels=len(task.words)
    ).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id
    batches = partial(DataLoader, batch_size=batch_size, collate_fn=DataCollatorWithPadding(tokenizer))
    labeled = zip(encode(train), train["label"][:], strict=True)
    fitted = fit_head(
        model, batches([{"input_ids": ids, "labels": label} for ids, label in labeled]), max_rows=len(train)
    )
    with torch.no_grad():
        logits = torch.cat([model(**batch).logits for batch in batches([{"input_ids": ids} for ids in encode(test)])])
    found = {"passes": fitted.forward_passes, "accuracy": accuracy(logits, labels), "validated": fitted.accuracy}
    return dict(settings) | found | {"majority": majority_accuracy(labels)}


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of the test accuracies, a row for each problem."""
    ways = [way for way in WAYS if any(run["way"] == way for run in runs)]
    lines = [
        f"| {Path(runs[0]['model']).name} | majority | {' | '.join(WAYS[way] for way in ways)} |",
        "|---" + "|---:" * (1 + len(ways)) + "|",
    ]
    for problem in dict.fromkeys(run["problem"] for run in runs):
        of_problem = {run["way"]: run for run in runs if run["problem"] == problem}
        cells = [f"{of_problem[way]['accuracy']:.3f}" if way in of_problem else "" for way in ways]
        lines.append(f"| {problem} | {next(iter(of_problem.values()))['majority']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    args = arguments(words)
    check_folder("--output", args.output, "table.md")
    log = FinishedRuns(args.output / FILE, SETTINGS)
    every = list(wanted(args))
    for settings in tqdm([settings for settings in every if log.find(settings) is None], unit="run"):
        log.add(measure(settings))
    text = table([run for settings in every if (run := log.find(settings)) is not None])
    (args.output / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    with command(finished_runs_are_kept), refusals_end_the_command():
        main()
