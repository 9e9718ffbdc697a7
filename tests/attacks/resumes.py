"""Runs that are resumed after a change of an argument, the data or the model.

An answer is right if the change is refused by one sentence that names it with both values; or if it is taken over, one line
says so, and what it governs has its new value; or if it has no effect on the run, which then ends with the same bits.
"""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tests.attacks.suite import Case
from tests.conftest import TinyTask, seeded, tiny_opt, weights_of
from tests.trainer.runs import make_trainer, trained, with_lora
from zo_hf import ZOTrainer

SAMPLE = 8
SMALL = {"hidden_size": 8, "ffn_dim": 8, "word_embed_proj_dim": 8, "num_hidden_layers": 1}
COMMON: dict[str, Any] = {"max_steps": 6, "learning_rate": 1e-3, "save_strategy": "no", "zo_rows_per_direction": 0}
COMMON |= {"logging_strategy": "no", "zo_normalize": True, "zo_num_directions": 2}
KINDS: dict[str, dict[str, Any]] = {
    "low_rank": {"zo_subspace": "low_rank", "optim": "adamw_torch"},
    "full": {"zo_subspace": "full"},
    "LoRA": {"zo_subspace": "adapter", "optim_args": "momentum=0.9"},
    "low_rank, a direction for every row": {"zo_subspace": "low_rank", "zo_rows_per_direction": 1},
}
STEP = 3


@dataclass(frozen=True)
class Change:
    """What differs in the resumed run, and what becomes of it.

    Args:
        named: what the refusal or the line must name; None if the run must end with the same bits.
        refused: True if the change is refused.
        options: arguments that differ.
        model: options of the model that differ.
        lora: options of the adapter that differ.
        rows: number of rows in the training data.
        only: the kinds of run that the change is for; empty for all.
        rate: the rate of the last step; None for no look.
    """

    named: str | None
    refused: bool
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    rows: int = 64
    only: tuple[str, ...] = ()
    rate: float | None = None


def _refused(named: str, *only: str, **options: Any) -> Change:
    return Change(named, True, options, only=only)


def _taken(named: str, *only: str, rate: float | None = None, **options: Any) -> Change:
    return Change(named, False, options, only=only, rate=rate)


def _same(*only: str, **options: Any) -> Change:
    return Change(None, False, options, only=only)


_LOW_RANK = ("low_rank", "low_rank, a direction for every row")
_SHARED = ("low_rank", "full", "LoRA")
_APART = ("low_rank, a direction for every row",)
CHANGES: dict[str, Change] = {
    # The method.
    "the subspace": _refused("zo_subspace", "low_rank", zo_subspace="norms"),
    "the rank": _refused("zo_rank", *_LOW_RANK, zo_rank=2),
    "the steps between folds": _refused("zo_fold_steps", *_LOW_RANK, zo_fold_steps=2),
    "eps": _refused("zo_eps", zo_eps=2e-3),
    "the seed": _refused("seed", seed=7),
    "the estimator": _refused("zo_estimator", zo_estimator="one_sided"),
    "the number of directions": _refused("zo_num_directions", zo_num_directions=3),
    "the directions": _refused("zo_direction", zo_direction="rademacher"),
    "the normalization": _refused("zo_normalize", zo_normalize=False),
    "the largest c": _refused("zo_max_projected_grad", zo_max_projected_grad=3.0),
    "the rows of a direction": _refused("zo_rows_per_direction", "low_rank", zo_rows_per_direction=1),
    "the modules": _refused("zo_target_modules", zo_target_modules=".*(q_proj|fc1).*"),
    "the modules, as many coordinates": _refused("zo_target_modules", zo_target_modules=".*(k_proj|v_proj).*"),
    "the excluded modules": _refused("zo_exclude_modules", zo_exclude_modules=".*fc2.*"),
    # The optimizer.
    "the optimizer": _refused("optim", "low_rank", optim="sgd"),
    "the optimizer, to AdamW": _refused("optim", "LoRA", optim="adamw_torch", optim_args=None),
    "the weight decay": _refused("weight_decay", weight_decay=0.1),
    "the weight decay, low-rank": _refused("weight_decay", "low_rank", weight_decay=0.01),
    "the momentum": _refused("momentum", "LoRA", optim_args="momentum=0.5"),
    "beta": _refused("betas", "low_rank", adam_beta1=0.8),
    "Adam's epsilon": _refused("eps", "low_rank", adam_epsilon=1e-6),
    # The length.
    "more steps": _taken("max_steps", max_steps=8),
    "epochs instead of steps": _taken("max_steps", max_steps=-1, num_train_epochs=1),
    "fewer steps": _taken("max_steps", max_steps=5),
    "fewer steps than were taken": _taken("max_steps", max_steps=2),
    "a budget": _taken("zo_max_forward_passes", zo_max_forward_passes=40),
    "a time": _taken("zo_max_time", zo_max_time=1000.0),
    # The rate.
    "a higher rate": _taken("learning_rate", rate=3e-3, learning_rate=3e-3),
    "a lower rate": _taken("learning_rate", rate=1e-5, learning_rate=1e-5),
    "a falling schedule": _taken("lr_scheduler_type", rate=1e-3 * 1 / 6, lr_scheduler_type="linear"),
    "a rate and a schedule": _taken("learning_rate", rate=2e-3 / 6, learning_rate=2e-3, lr_scheduler_type="linear"),
    "a schedule's option": _taken(
        "lr_scheduler_kwargs", lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-4}
    ),
    "a warmup": _taken("warmup_steps", rate=1e-3 * 5 / 10, lr_scheduler_type="constant_with_warmup", warmup_steps=10),
    "a schedule that watches the loss": _taken(
        "lr_scheduler_type", lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=3
    ),
    "clipping": _taken("max_grad_norm", max_grad_norm=0.01),
    # The data.
    "a larger batch": _taken("per_device_train_batch_size", *_SHARED, per_device_train_batch_size=16),
    "a smaller batch": _taken("per_device_train_batch_size", *_SHARED, per_device_train_batch_size=4),
    "accumulation": _taken("gradient_accumulation_steps", *_SHARED, gradient_accumulation_steps=2),
    "a larger batch of rows apart": _refused("per_device_train_batch_size", *_APART, per_device_train_batch_size=16),
    "accumulation of rows apart": _refused("gradient_accumulation_steps", *_APART, gradient_accumulation_steps=2),
    "less data": Change("len(train_dataset)", False, rows=40),
    "more data": Change("len(train_dataset)", False, rows=200),
    "the seed of the data": _taken("data_seed", data_seed=3),
    "whole batches only": _taken("dataloader_drop_last", dataloader_drop_last=True),
    "smoothed labels": _taken("label_smoothing_factor", *_SHARED, label_smoothing_factor=0.1),
    # The precision and the model.
    "autocast": _taken("bf16", *_SHARED, bf16=True),
    "the dtype": Change("dtype", True, model={"dtype": torch.bfloat16}),
    "the size": Change("number of weights", True, model={"hidden_size": 16, "word_embed_proj_dim": 16}),
    "the base": Change("base", True, model={"seed": 5}, only=("LoRA",)),
    "the adapter's rank": Change("r=", True, lora={"r": 2}, only=("LoRA",)),
    "the adapter's scale": Change("lora_alpha", True, lora={"lora_alpha": 16}, only=("LoRA",)),
    "the adapter's modules": Change("target_modules", True, lora={"target_modules": ["q_proj"]}, only=("LoRA",)),
    # What has no effect.
    "logging": _same(logging_strategy="steps", logging_steps=2),
    "saving": _same(save_strategy="steps", save_steps=4, save_total_limit=1),
    "evaluation": _same(eval_strategy="steps", eval_steps=2),
    "the rows of an evaluation": _same(per_device_eval_batch_size=3),
    "the comparison of ranks": _same(zo_check_steps=1),
    "workers": _same("low_rank", dataloader_num_workers=1),
}


def _build(kind: str, model: dict[str, Any], lora: dict[str, Any]) -> nn.Module:
    more = dict(model)
    made = seeded(tiny_opt, more.pop("dtype", torch.float32), more.pop("seed", 0), **SMALL | more)
    return with_lora(made, **lora) if kind == "LoRA" else made


@functools.cache
def _whole(kind: str, only: bool) -> tuple[Path, dict[str, Tensor]]:
    """The folder of a run with a checkpoint at `STEP`, and the weights that the run ended with."""
    folder = Path(tempfile.mkdtemp())
    options = COMMON | KINDS[kind] | {"save_only_trajectory": only, "save_strategy": "steps", "save_steps": STEP}
    model = _build(kind, {}, {})
    trained(folder, model, **options)
    shutil.rmtree(folder / "checkpoint-6")
    return folder, weights_of(model)


class _Said(logging.Handler):
    """Keeps what zo_hf warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class _Rates(TrainerCallback):
    """Notes the learning rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **more: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def _resumed(trainer: ZOTrainer, folder: Path) -> list[str]:
    """Resume, and return what was said."""
    said, before = _Said(), logging.root.manager.disable
    logging.disable(logging.NOTSET)
    logging.getLogger("zo_hf").addHandler(said)
    try:
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEP}"))
    finally:
        logging.getLogger("zo_hf").removeHandler(said)
        logging.disable(before)
    return said.lines


def _changed(kind: str, only: bool, change: Change, folder: Path) -> str | None:
    source, expected = _whole(kind, only)
    run = folder / "run"
    shutil.copytree(source, run)
    options = COMMON | KINDS[kind] | {"save_only_trajectory": only} | change.options
    model = _build(kind, change.model, change.lora)
    notes = _Rates()
    more = {"train_dataset": TinyTask(change.rows), "callbacks": [notes]}
    trainer = make_trainer(run, model, more=more, **options)
    try:
        said = _resumed(trainer, run)
    except (ValueError, RuntimeError) as error:
        text = str(error)
        if not change.refused:
            return f"it is refused: {text}"
        return None if (change.named or "") in text and "\n" not in text else f"the refusal does not name it: {text}"
    if change.refused:
        return "it is not refused"
    if change.named is None:
        weights = weights_of(model)
        same = all(torch.equal(weights[name], expected[name]) for name in expected)
        return None if same and not said else f"the run ends with other weights, or says {said}"
    lines = [line for line in said if "goes on with other arguments" in line]
    if len(lines) != 1 or f"{change.named}=" not in lines[0]:
        return f"no line, or several, say that {change.named} is taken over: {said}"
    if change.rate is not None and abs(notes.rates[-1] - change.rate) > 1e-9:
        return f"the last step was taken with the rate {notes.rates[-1]} instead of {change.rate}"
    return None


def cases() -> list[Case]:
    """Return the table."""
    return [
        Case(
            f"{what} of {kind}, {'only the log' if only else 'with tensors'}",
            functools.partial(_changed, kind, only, change),
        )
        for what, change in CHANGES.items()
        for kind in (change.only or KINDS)
        for only in (False, True)
    ]
