"""A Trainer that keeps the facts of its training, for the model card and `training_args.bin`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.training_args import TrainingArguments

from zo_hf.engine import ZerothOrder
from zo_hf.trainer.model_card import Training, describe, training_of
from zo_hf.trainer.optimizer_hooks import OptimizerHooks


class DescribedTrainer(OptimizerHooks):
    """Keeps the learning rate and the method of a training when its engine is gone."""

    _used_rate: float | None = None
    _finished: Training | None = None

    @contextmanager
    def arguments_as_used(self) -> Iterator[TrainingArguments]:
        """Enter a context in which `args` has the learning rate of the last training, instead of None or "auto"."""
        given, used = self.args, self.args
        if self._used_rate is not None:
            used = copy.copy(given)
            used.learning_rate = self._used_rate
        self.args = used
        try:
            yield used
        finally:
            self.args = given

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Create Trainer's model card, and describe the zeroth-order training in it."""
        with self.arguments_as_used():
            super().create_model_card(*args, **kwargs)
        self.describe_training_in_card()

    def describe_training_in_card(self) -> None:
        """Write the method, its papers, the rate, the forward passes and the seed into the model card, if it exists."""
        training = self._finished if self.zo is None else training_of(self.zo)
        if training is not None and self.is_world_process_zero():
            describe(Path(self.args.output_dir) / "README.md", training, self._used_rate)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of a step; Trainer counts a forward and a backward pass, three times a forward pass."""
        if self.zo is None:
            passes = len(self.args.settings().make_estimator(1.0).probes())
        else:
            passes = self.zo.forward_passes_per_step + self.zo.curvature_passes
        return super().floating_point_ops(inputs) * passes // self._ranks.grid.sharing // 3

    def _keep_rate(self) -> None:
        group = self._torch_optimizer().param_groups[0]
        self._used_rate = float(group.get("initial_lr", group["lr"]))

    def _keep_training(self, zo: ZerothOrder) -> None:
        self._finished = training_of(zo)

    def _save_arguments(self, folder: Path) -> None:
        """Write `training_args.bin` with the learning rate that was used."""
        path = folder / TRAINING_ARGS_NAME
        if self._used_rate is not None and path.is_file() and self.args.should_save:
            with self.arguments_as_used() as used:
                torch.save(used, path)
