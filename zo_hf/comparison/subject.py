"""The subject of a run: a model with its examples, its loss and its scores, for each way to put a task to a model.

    prompt      the text in a template, answered by a label word of a causal language model
    head        the bare text, answered by a fresh classification head on the same model
    fitted      the bare text, answered by a head that was fitted to the features of the training rows
    scratch     pictures, answered by a network with random weights

The first is task alignment as Malladi et al. (arXiv 2305.17333) have it: the pretraining's own objective. Without it,
zeroth-order methods may learn much less (arXiv 2605.15622).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from zo_hf.comparison.job import SCRATCH, Job
from zo_hf.comparison.suite import TASKS, Parts, Sizes, TextTask
from zo_hf.comparison.suite.digits import NETWORKS, batch_of_pictures, digits
from zo_hf.heads import fit_head
from zo_hf.tasks.classify import accuracy, calibrated, label_prior, next_token_scores
from zo_hf.tasks.label_word_loss import LabelWordLoss
from zo_hf.tasks.prompts import LabelWordCollator, encode_example, encode_prompt, label_token_ids, pad_token_id

Scores = dict[str, float]


@dataclass(frozen=True)
class Subject:
    """All that a run needs beside its method.

    Attributes:
        model: the model, on its device, in eval mode.
        examples: the training examples.
        collator: batches examples.
        loss: a `compute_loss_func` of Trainer; None for the model's own loss.
        score: returns `loss` and `accuracy` of the model in its present state on the scored rows, and with a prompt
            `calibrated_accuracy` as `zo-hf train` reports it.
        labels: the labels of the scored rows.
    """

    model: Any
    examples: Dataset
    collator: Callable[[Any], Any]
    loss: Callable[..., Tensor] | None
    score: Callable[[], Scores]
    labels: Sequence[int]


def load(job: Job, options: dict[str, Any]) -> Subject:
    """Load the subject of a job; a run is scored on test rows, and a trial on development rows.

    Args:
        job: the job.
        options: the method's options.
    """
    parts = parts_of_task(job.task, Sizes(job.train_rows, job.eval_rows, job.max_words))
    scored = parts.test if job.evaluations else parts.development
    # A forward gradient needs an attention implementation with forward-mode differentiation.
    arguments = {"attn_implementation": "eager"} if options.get("zo_estimator") == "forward_gradient" else {}
    if job.alignment == SCRATCH:
        return _from_scratch(job, parts.train, scored)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    task = TASKS[job.task]
    if job.alignment == "prompt":
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, **arguments)
        return _prompted(job, task, _ready(model, job, options), tokenizer, parts.train, scored)
    torch.manual_seed(job.seed)  # transformers draws the head from torch's own generator
    model = AutoModelForSequenceClassification.from_pretrained(
        job.model, dtype=torch.float32, num_labels=len(task.words), **arguments
    )
    subject = _with_head(job, task, _ready(model, job, options), tokenizer, parts.train, scored)
    if job.alignment == "fitted":
        # A generator of its own, because a loader without one draws from torch's.
        batches = DataLoader(
            subject.examples, job.batch_size, collate_fn=subject.collator, generator=torch.Generator()
        )
        fit_head(model, batches, max_rows=len(subject.examples))
    return subject


@lru_cache(maxsize=32)
def parts_of_task(task: str, sizes: Sizes) -> Parts:
    """Return the parts of a task of the suite.

    Raises:
        ValueError: there are too few rows, or a package is missing.
    """
    return digits(sizes) if task in NETWORKS else TASKS[task].load(sizes)


def with_lora(model: Any, seed: int) -> Any:
    """Return a model with the LoRA adapter of all comparisons: rank 8 on every linear layer except the head, with B = 0.

    Args:
        model: a model without an adapter.
        seed: seed of A.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # PEFT draws the adapter from torch's own generator
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def _ready(model: Any, job: Job, options: dict[str, Any]) -> Any:
    """Add a LoRA adapter if the options need one, and move the model to its device."""
    if options.get("zo_subspace") == "adapter":
        model = with_lora(model, job.seed)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _prompted(
    job: Job, task: TextTask, model: Any, tokenizer: PreTrainedTokenizerBase, train: Dataset, scored: Dataset
) -> Subject:
    label_ids, longest = label_token_ids(tokenizer, task.prompt()), task.max_tokens(job.max_words)
    examples = [
        encode_example(tokenizer, task.prompt(row["pair"]), row["text"], label_ids[row["label"]], longest)
        for row in train
    ]
    questions = [encode_prompt(tokenizer, task.prompt(row["pair"]), row["text"], longest) for row in scored]
    labels: list[int] = scored["label"][:]
    # The scores are already log-probabilities over the vocabulary.
    loss_of = nn.functional.cross_entropy if job.loss == "label_words" else nn.functional.nll_loss

    def score() -> Scores:
        # As many rows as in training, so that scoring never needs more memory.
        scores = next_token_scores(model, tokenizer, questions, label_ids, job.batch_size)
        prior = label_prior(model, tokenizer, task.prompt())
        return {
            "loss": loss_of(scores, torch.tensor(labels)).item(),
            "accuracy": accuracy(scores, labels),
            "calibrated_accuracy": accuracy(calibrated(scores, prior), labels),
        }

    loss = LabelWordLoss(label_ids) if job.loss == "label_words" else None
    return Subject(model, Dataset.from_list(examples), LabelWordCollator(tokenizer, model), loss, score, labels)


def _with_head(
    job: Job, task: TextTask, model: Any, tokenizer: PreTrainedTokenizerBase, train: Dataset, scored: Dataset
) -> Subject:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    longest = task.max_tokens(job.max_words)

    def encode(rows: Dataset) -> Dataset:
        def encoded(row: dict[str, Any]) -> dict[str, Any]:
            texts = (row["text"], row["pair"]) if row["pair"] else (row["text"],)
            return dict(tokenizer(*texts, truncation="longest_first", max_length=longest)) | {"labels": row["label"]}

        return Dataset.from_list([encoded(row) for row in rows])

    collator = DataCollatorWithPadding(tokenizer)
    held_out, labels = list(encode(scored)), scored["label"][:]
    score = _scorer(model, held_out, collator, job.batch_size)
    return Subject(model, encode(train), collator, None, score, labels)


def _from_scratch(job: Job, train: Dataset, scored: Dataset) -> Subject:
    torch.manual_seed(job.seed)
    model = NETWORKS[job.task]().to("cuda" if torch.cuda.is_available() else "cpu").eval()
    score = _scorer(model, list(scored), batch_of_pictures, job.batch_size)
    return Subject(model, train, batch_of_pictures, class_loss, score, scored["label"][:])


def class_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Return the mean cross entropy over a batch, or the sum divided by `num_items_in_batch`, (), as Trainer calls it."""
    losses = nn.functional.cross_entropy(outputs["logits"].float(), labels, reduction="none")
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


def _scorer(
    model: nn.Module, rows: Sequence[Any], collator: Callable[[Any], Any], batch_size: int
) -> Callable[[], Scores]:
    """Return a function that computes the loss and the accuracy of a classifier with `logits`, (rows, classes)."""

    @torch.no_grad()
    def score() -> Scores:
        device, was_training = next(model.parameters()).device, model.training
        model.eval()
        logits, labels = [], []
        for start in range(0, len(rows), batch_size):
            batch = dict(collator(rows[start : start + batch_size]))
            labels.append(batch.pop("labels"))
            logits.append(model(**{name: tensor.to(device) for name, tensor in batch.items()})["logits"].float().cpu())
        model.train(was_training)
        scores, truth = torch.cat(logits), torch.cat(labels)
        return {
            "loss": nn.functional.cross_entropy(scores, truth).item(),
            "accuracy": accuracy(scores, truth.tolist()),
        }

    return score
