"""One run of a comparison: a method with a learning rate and a number of forward passes, on one problem.

For every method, a run has the same rows, the same loss, a constant learning rate, and as many steps as its forward passes
allow. The seed determines the order of the rows, the directions, and weights that do not come with the model.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from contextlib import suppress
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from zo_hf.comparison.job import Job
from zo_hf.comparison.progress import Progress
from zo_hf.comparison.subject import Subject, load
from zo_hf.memory.peak import MIB, PeakMemory, resident_bytes
from zo_hf.subspaces.sites import find_sites
from zo_hf.tasks.classify import constant_loss, majority_accuracy
from zo_hf.trainer.config import ZOConfig
from zo_hf.trainer.trainer import ZOTrainer

#: The cost of a step with a backward pass, which takes about twice the time of the forward pass.
FORWARDS_OF_BACKPROPAGATION = 3


def run(job: Job) -> dict[str, Any]:
    """Train and score one model.

    Returns:
        A dictionary with these entries:
        `forward_passes` and `forwards_per_step`, as the engine counts them;
        `majority_accuracy` and `constant_loss`, of the best answer that is the same for all scored rows;
        `seconds` of training (of processor time on a CPU);
        `peak_mib`, the peak memory of a GPU, or on a CPU by how much the process grew, weights and data included;
        `scores`, a list of the results of `Subject.score` with the `forward_passes` and `seconds` of training before each.

    Raises:
        ValueError: the options do not work together, or one step takes more than the budget.
    """
    options = json.loads(job.options)
    held = _memory_without_last_run()
    with PeakMemory() as peak:
        subject = load(job, options)
        progress = Progress(job.budget, max(job.evaluations, 1), subject.score)
        if job.budget:
            train(job, options, subject, progress)
        else:
            progress.score()
    return {
        "forward_passes": progress.passes,
        "forwards_per_step": progress.forwards_per_step,
        "majority_accuracy": majority_accuracy(subject.labels),
        "constant_loss": constant_loss(subject.labels),
        "seconds": progress.seconds,
        "peak_mib": peak.mib - held,
        "scores": progress.scores,
    }


def _memory_without_last_run() -> float:
    """Give back the memory of the last run, and return what the process still holds beside weights, in MiB."""
    gc.collect()  # the last run's model is kept by reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        return 0.0
    if sys.platform == "linux":
        # Freed memory that the process keeps would hide how much the next run needs. Not every C library has the function.
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes() / MIB


def train(job: Job, options: dict[str, Any], subject: Subject, progress: Progress) -> None:
    """Train until the budget is spent, with a `ZOTrainer` or with a plain Trainer and backward passes."""
    model = subject.model
    more = {
        "train_dataset": subject.examples,
        "data_collator": subject.collator,
        "compute_loss_func": subject.loss,
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
