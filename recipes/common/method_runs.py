"""One run of a comparison of methods: a model, a method's options and a number of forward passes.

For every method, a run has the same sentences, the same prompt and loss, a constant learning rate, and as many steps
as its forward passes allow. The seed determines the order of the sentences and the directions.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from zo_hf.memory.peak import MIB
from zo_hf.subspaces.sites import find_sites
from zo_hf.tasks.classify import accuracy, calibrated, label_prior, label_scores, majority_accuracy
from zo_hf.tasks.data import embedded_reviews
from zo_hf.tasks.label_word_loss import LabelWordLoss
from zo_hf.tasks.prompts import PROMPT_A, LabelWordCollator, encode_example, label_token_ids
from zo_hf.trainer.config import ZOConfig
from zo_hf.trainer.trainer import ZOTrainer

#: The cost of a step with a backward pass, which takes about twice the time of the forward pass.
FORWARDS_OF_BACKPROPAGATION = 3
#: The seed of the split into training, development and test sentences, the same for every run.
DATA_SEED = 0


@dataclass(frozen=True)
class Job:
    """The settings that identify a run.

    Attributes:
        model: a causal language model, a folder or a name.
        method: the method's name for display.
        options: JSON of the options of ZOConfig, except the learning rate; `"backward": true` is a plain Trainer.
        learning_rate: the constant learning rate.
        seed: seed of the order of sentences and of the directions.
        budget: maximum number of forward passes of a batch; 0 evaluates the untrained model.
        evaluations: how often the test sentences are scored during the run; 0 scores the development sentences at the
            end.
        batch_size: sentences in a forward pass.
        train_rows: number of training sentences.
        eval_rows: number of development sentences, and of test sentences.
        max_words: maximum number of words in a sentence.
        loss: "label_words" compares the label words alone; "vocabulary" is the model's own loss of the label word.
    """

    model: str
    method: str
    options: str
    learning_rate: float
    seed: int
    budget: int
    evaluations: int
    batch_size: int
    train_rows: int
    eval_rows: int
    max_words: int
    loss: str = "label_words"


SETTINGS = tuple(field.name for field in fields(Job))


def run(job: Job) -> dict[str, Any]:
    """Train and score one model.

    Returns:
        A dictionary with these entries:
        `forward_passes` and `forwards_per_step`, as the engine counts them;
        `majority_accuracy`;
        `seconds` of training (of processor time on a CPU);
        `peak_mib`, the peak memory of a GPU including weights, or None on a CPU;
        `scores`, a list of the results of `Scorer` with the `forward_passes` and `seconds` of training before each.

    Raises:
        ValueError: the options do not work together, or one step takes more than the budget.
    """
    options = json.loads(job.options)
    if torch.cuda.is_available():  # otherwise the last run's model, kept by reference cycles, would count in this peak
        gc.collect()
        torch.cuda.empty_cache()
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = load_model(job, options)
    words = range(min(8, job.max_words), job.max_words + 1)
    sentences = embedded_reviews(job.train_rows, 2 * job.eval_rows, DATA_SEED, words)
    half = len(sentences.held_out) // 2
    rows = range(half, 2 * half) if job.evaluations else range(half)
    scorer = Scorer(tokenizer, sentences.held_out.select(rows), job.batch_size, 4 * words.stop, job.loss)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    progress = Progress(job.budget, max(job.evaluations, 1), lambda: scorer(model))
    if job.budget:
        train(job, options, model, tokenizer, sentences.train, 4 * words.stop, progress)
    else:
        progress.score()
    return {
        "forward_passes": progress.passes,
        "forwards_per_step": progress.forwards_per_step,
        "majority_accuracy": majority_accuracy(scorer.labels),
        "seconds": progress.seconds,
        "peak_mib": torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else None,
        "scores": progress.scores,
    }


def load_model(job: Job, options: dict[str, Any]) -> Any:
    """Load the model in float32, with a LoRA adapter if the options need one."""
    # A forward gradient needs an attention implementation with forward-mode differentiation.
    attention = {"attn_implementation": "eager"} if options.get("zo_estimator") == "forward_gradient" else {}
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, **attention)
    if options.get("zo_subspace") == "adapter":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(job.seed)  # PEFT draws the adapter from torch's own generator
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


class Scorer:
    """Computes loss and accuracy of a model on some sentences, from the logits of the label words.

    Args:
        tokenizer: the model's tokenizer.
        sentences: a data set with the columns `text` and `label`.
        batch_size: the batch size of training, so that scoring never needs more memory.
        max_length: maximum number of tokens in prompt and sentence.
        loss: the loss of training, see `Job`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, sentences: Dataset, batch_size: int, max_length: int, loss: str
    ) -> None:
        self.tokenizer, self.batch_size, self.max_length, self.loss = tokenizer, batch_size, max_length, loss
        self.texts: list[str] = sentences["text"][:]
        self.labels: list[int] = sentences["label"][:]

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return `loss` as in training, and `accuracy` and `calibrated_accuracy` as `zo-hf train` reports them."""
        scores = label_scores(model, self.tokenizer, self.texts, PROMPT_A, self.batch_size, self.max_length)
        prior = label_prior(model, self.tokenizer, PROMPT_A)
        # The scores are already log-probabilities over the vocabulary.
        loss = nn.functional.cross_entropy if self.loss == "label_words" else nn.functional.nll_loss
        return {
            "loss": loss(scores, torch.tensor(self.labels)).item(),
            "accuracy": accuracy(scores, self.labels),
            "calibrated_accuracy": accuracy(calibrated(scores, prior), self.labels),
        }


class Progress(TrainerCallback):
    """Counts forward passes, scores the model at equal shares of the budget, and stops before exceeding the budget.

    Args:
        budget: the number of forward passes.
        evaluations: the number of scores in a run, including the one at its end.
        scorer: scores the model in its present state.

    Attributes:
        count: returns the forward passes after a number of steps; to be set before training.
        passes: forward passes so far.
        forwards_per_step: the largest number of forward passes in a step.
        seconds: training time so far, without scoring.
        scores: the scores so far.
    """

    count: Callable[[int], int]

    def __init__(self, budget: int, evaluations: int, scorer: Callable[[], dict[str, float]]) -> None:
        self.budget, self.evaluations, self.scorer = budget, evaluations, scorer
        self.passes = self.forwards_per_step = 0
        self.seconds = 0.0
        self.scores: list[dict[str, float]] = []
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        passes = self.count(state.global_step)
        self.forwards_per_step = max(self.forwards_per_step, passes - self.passes)
        if passes > self.budget:
            raise ValueError(
                f"a step takes {self.forwards_per_step} forward passes, more than the budget of {self.budget}; increase "
                "the budget."
            )
        self.passes = passes
        is_last = passes + self.forwards_per_step > self.budget
        if is_last or passes * self.evaluations >= (len(self.scores) + 1) * self.budget:
            self.seconds += now() - self._since
            self.score()
            self._since = now()
        control.should_training_stop |= is_last

    def score(self) -> None:
        """Append the model's present score."""
        self.scores.append({"forward_passes": self.passes, "seconds": self.seconds} | self.scorer())


def train(
    job: Job,
    options: dict[str, Any],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Dataset,
    max_length: int,
    progress: Progress,
) -> None:
    """Train `model` until the budget is spent, with a `ZOTrainer` or with a plain Trainer and backward passes."""
    label_ids = label_token_ids(tokenizer, PROMPT_A)
    encoded = [
        encode_example(tokenizer, PROMPT_A, row["text"], label_ids[row["label"]], max_length) for row in sentences
    ]
    more = {
        "train_dataset": Dataset.from_list(encoded),
        "data_collator": LabelWordCollator(tokenizer, model),
        "compute_loss_func": LabelWordLoss(label_ids) if job.loss == "label_words" else None,
        "callbacks": [progress],
    }
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "seed": job.seed,
            "data_seed": job.seed,
            "learning_rate": job.learning_rate,
            "lr_scheduler_type": "constant",
            "max_steps": job.budget,  # more than the budget allows
            "per_device_train_batch_size": job.batch_size,
            "dataloader_drop_last": True,
            "dataloader_pin_memory": False,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": not torch.cuda.is_available(),
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        trainer: Trainer
        if options.pop("backward", False):
            # Only those parameters train that the other methods move.
            moving = {
                id(site.parameter) for site in find_sites(model, exclude=options.pop("zo_exclude_modules", None))
            }
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in moving)
            trainer = Trainer(model, TrainingArguments(**common | options), **more)
            progress.count = lambda steps: FORWARDS_OF_BACKPROPAGATION * steps
        else:
            trainer = zo_trainer = ZOTrainer(
                model, ZOConfig(**common | {"zo_batched_probes": False, "zo_rows_per_direction": 0} | options), **more
            )
            progress.count = lambda steps: zo_trainer.zo.forward_passes if zo_trainer.zo is not None else 0
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def now() -> float:
    """Return a time in seconds: on a CPU, processor time of this process, which other programs do not affect."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
