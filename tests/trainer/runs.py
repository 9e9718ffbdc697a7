"""Short training runs that the tests of this folder compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, default_data_collator

from tests.conftest import TinyTask, seeded, tiny_opt
from zo_hf import ZOConfig, ZOTrainer


def config(folder: Path | str, kind: type[ZOConfig] = ZOConfig, **options: Any) -> ZOConfig:
    """Arguments of a run of a few steps on one CPU that neither saves nor reports unless asked to."""
    defaults = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "zo_fold_steps": 3}
    defaults |= {"save_strategy": "no", "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return kind(output_dir=str(folder), **defaults | options)


def make_trainer(
    folder: Path | str,
    model: nn.Module | None = None,
    kind: type[ZOTrainer] = ZOTrainer,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> ZOTrainer:
    """A trainer of `model` (default: the tiny OPT) on `TinyTask`.

    Args:
        more: arguments of the trainer beside `model` and `args`.
        options: those of its `ZOConfig`.
    """
    if model is None and "model_init" not in (more or {}):
        model = seeded(tiny_opt)
    data = {"train_dataset": TinyTask(), "eval_dataset": TinyTask(16)}
    return kind(model, config(folder, **options), **data | (more or {}))


def trained(folder: Path | str, *args: Any, resume: Any = None, **options: Any) -> ZOTrainer:
    """`make_trainer`, after its `train`."""
    trainer = make_trainer(folder, *args, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: ZOTrainer, key: str) -> list[float]:
    """The values logged under a key, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def passes_of_steps(trainer: ZOTrainer) -> list[int]:
    """The forward passes logged with every training loss."""
    return [entry["zo/forward_passes"] for entry in trainer.state.log_history if "loss" in entry]


def with_lora(model: nn.Module, **options: Any) -> nn.Module:
    """`model` inside a PEFT LoRA model whose adapter depends on nothing but a seed."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "target_modules": "all-linear", "lora_alpha": 8} | options
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(**options))


class InOrder(ZOTrainer):
    """Takes the rows in their order."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)


class SkipsThird(ZOTrainer):
    """The loss of the third step is not finite."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 else loss


class At(TrainerCallback):
    """Calls `action(trainer's keyword arguments, state)` at the end of some steps.

    Args:
        steps: the steps, counted from 1; None means every one.
        action: what to call; its result is appended to `results`.
    """

    def __init__(self, steps: set[int] | None, action: Any) -> None:
        self.steps, self.action = steps, action
        self.results: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.steps is None or state.global_step in self.steps:
            self.results.append(self.action(state, **kwargs))


class SaveAt(TrainerCallback):
    """Has a checkpoint written after some steps, counted from 1."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            control.should_save = True


class Coordinates(TrainerCallback):
    """Notes where the coordinates of a run that does not fold are after each of its steps, and who holds which.

    Attributes:
        lengths: of every step, in the 2-norm.
        decay: weight decay of every coordinate, by name.
    """

    def __init__(self) -> None:
        self.trainer: Any = None
        self.lengths: list[float] = []
        self.decay: dict[str, float] = {}
        self._before: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = self._copy()
        names = {id(p): name for name, p in self.trainer.zo.subspace.coordinates.items()}
        for group in kwargs["optimizer"].param_groups:
            self.decay |= {names[id(p)]: group["weight_decay"] for p in group["params"]}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = self._copy()
        self.lengths.append(sum(float((after[n] - self._before[n]).square().sum()) for n in after) ** 0.5)

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().double() for name, p in self.trainer.zo.subspace.coordinates.items()}


def with_coordinates(folder: Path | str, *args: Any, **options: Any) -> tuple[ZOTrainer, Coordinates]:
    """A trained trainer, and what its coordinates did."""
    notes = Coordinates()
    notes.trainer = make_trainer(folder, *args, more={"callbacks": [notes]} | options.pop("more", {}), **options)
    notes.trainer.train()
    return notes.trainer, notes


class Recorder:
    """A collator that keeps the batches it made."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        self.batches.append(default_data_collator(rows))
        return {name: tensor.clone() for name, tensor in self.batches[-1].items()}
