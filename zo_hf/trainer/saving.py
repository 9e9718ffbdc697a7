"""A Trainer whose checkpoints hold the engine's state beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from zo_hf import checkpoint
from zo_hf.offload import is_offloaded, whole_state_dict
from zo_hf.parallel.shards import gathered_state_dict
from zo_hf.subspaces.peft_methods import embeddings_of, is_peft
from zo_hf.trainer import changes
from zo_hf.trainer.checkpoints import (
    RunFiles,
    becoming_adapter,
    load_best_weights,
    load_weights_of,
    save_becoming_adapter,
)
from zo_hf.trainer.described import DescribedTrainer
from zo_hf.trainer.finite_weights import check_finite
from zo_hf.trainer.learning_rate import InitialLearningRate


class SavesAtStepEnd(TrainerCallback):
    """Has a checkpoint written at the end of the step under way, if one was asked for in the middle of it.

    Trainer's checkpoint after a SIGTERM may be due between an estimate and the optimizer's step. The method then has seen
    the step's numbers, and would see them again when the step is taken again.

    Attributes:
        is_due: True if such a checkpoint was asked for.
    """

    def __init__(self) -> None:
        self.is_due = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget what an interrupted training has asked for."""
        self.is_due = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for the checkpoint."""
        if self.is_due:
            control.should_save, self.is_due = True, False


class SavingTrainer(DescribedTrainer):
    """Overrides the hooks of Trainer that write and read checkpoints."""

    callback_handler: Any
    processing_class: Any
    _files: RunFiles
    _budget: Any
    _learning_rate: InitialLearningRate | None
    lr_scheduler: Any
    _run: dict[str, Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._at_step_end = SavesAtStepEnd()
        super().__init__(*args, **kwargs)
        self.add_callback(self._at_step_end)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as Trainer does, in a staging folder that is moved to its place when the disk holds all of it."""
        if self.zo is not None and self.zo.awaits_optimizer:
            self._at_step_end.is_due = True
            return
        self._check_weights(self.zo)
        self._files.stage(Path(self._get_output_dir(trial=trial)), self.state)
        try:
            super()._save_checkpoint(model, trial)
            folder = self._files.publish(self.state)
            if self.args.push_to_hub:
                super()._push_from_checkpoint(folder)
            self._ranks.barrier()
        finally:
            self._files.staging = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._files.staging is None:  # else `_save_checkpoint` pushes the complete checkpoint
            super()._push_from_checkpoint(checkpoint_folder)

    def _get_output_dir(self, trial: Any) -> str:
        staging = self._files.staging
        return super()._get_output_dir(trial) if staging is None else str(staging.folder.parent)

    @property
    def _run_folder(self) -> Path:
        return Path(self._get_output_dir(getattr(self, "_trial", None)))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self._files.staging is not None and self.args.save_only_trajectory:
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
            return
        if not self.args.should_save and self._division is None:
            return
        adapter = becoming_adapter(self.zo)
        if adapter is not None:
            folder = Path(output_dir or self.args.output_dir)
            check_finite(self.model, {}, adapter.coordinates)
            save_becoming_adapter(adapter, folder, self.args, self.processing_class)
            self._save_arguments(folder)
            return
        if state_dict is None:
            state_dict = self._weights_to_save()
        check_finite(self.model, state_dict)
        if self._files.staging is not None:
            self._files.note_weights(self.model, state_dict)
        super()._save(output_dir, state_dict)
        self._save_arguments(Path(output_dir or self.args.output_dir))

    def _weights_to_save(self) -> dict[str, Tensor] | None:
        """Return the weights as of now, whole and with the coordinates folded in; None if the model itself has them."""
        weights = None if self.zo is None else self.zo.folded_state_dict()
        if weights is None and self._division is not None:
            return gathered_state_dict(self.model, frozen=not is_peft(self.model))
        if weights is None and is_offloaded(self.model):
            return whole_state_dict(self.model, embeddings_of(self.model) if is_peft(self.model) else None)
        return weights

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.save_only_trajectory:
            super()._save_optimizer_and_scheduler(output_dir)
        if self.zo is None or not (self.args.should_save or self._division is not None):
            return
        rate = self._learning_rate
        found = rate.value if rate is not None and rate.is_searched else None
        optimizer, data = self._torch_optimizer(), self._position.to_saved()
        self._save_secret(Path(output_dir))
        self._files.save_engine(
            self.zo, optimizer, self.lr_scheduler, Path(output_dir), self._budget.seconds, found, data, self._run
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights_of(model or self.model, Path(resume_from_checkpoint))
        if self._division is not None:
            self._division.base_hash = None

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is None or self.zo is None:
            super()._load_optimizer_and_scheduler(folder)
            return
        path, optimizer, scheduler = Path(folder), self._torch_optimizer(), self.lr_scheduler
        rates = changes.rates_of(optimizer)
        changed = {} if self._run is None else changes.changed_arguments(self._run, path)
        if "lr_scheduler_type" in changed:
            self.lr_scheduler = changes.NoState()
        try:
            resumes = self._files.load_engine(self.zo, optimizer, self.lr_scheduler, path, self._run)
            if resumes:
                super()._load_optimizer_and_scheduler(folder)
        finally:
            self.lr_scheduler = scheduler
        if not resumes and not checkpoint.is_only_trajectory(path):
            return
        changes.take_over_rate(changed, optimizer, scheduler, rates, self.zo.step)
        self._check_same_noise(changed, path)
        changes.report(changed, path)
        self._budget.seconds_before = checkpoint.read_state(path).get("seconds", 0.0)
        if self.args.should_save:
            self._files.resume_log(self.zo, optimizer, self._run_folder, path)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Finalize as Trainer does; a subclass that loads the best weights itself loads them into a model without an engine."""
        load = self._load_best_model

        def load_without_engine() -> None:
            self._finish_zeroth_order()
            load()

        if self._is_overridden("_load_best_model"):
            self.__dict__["_load_best_model"] = load_without_engine
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.__dict__.pop("_load_best_model", None)

    def _load_best_model(self) -> None:
        # The engine's coordinates belong to the last step's weights, which the best weights replace.
        if self.zo is not None:
            self.zo.subspace.detach()
            self._forget_engine()
        best = load_best_weights(self.model, Path(str(self.state.best_model_checkpoint)))
        if best is not self.model:
            self.model = self.model_wrapped = self.callback_handler.model = best
