"""The files of a Trainer's run: checkpoints that are complete or absent, the engine's part of them, and the log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from zo_hf import checkpoint
from zo_hf.engine import ZerothOrder
from zo_hf.parallel.ranks import Ranks
from zo_hf.quantization import is_quantized
from zo_hf.subspaces import Adapter, LowRank
from zo_hf.subspaces.lora import save_adapter, with_saved_adapter
from zo_hf.subspaces.peft_methods import has_own_adapter, is_peft
from zo_hf.trainer import changes, manifest
from zo_hf.trainer.config import ZOConfig
from zo_hf.trainer.output_paths import check_folder
from zo_hf.trainer.weights import load_adapters, load_weights
from zo_hf.trajectory import recorder

logger = logging.getLogger(__name__)


class RunFiles:
    """Writes and reads the files of one run.

    Args:
        config: the run's arguments.
        ranks: the processes that train together.

    Attributes:
        staging: the folder that a checkpoint is being written in; None at other times.
    """

    def __init__(self, config: ZOConfig, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        self.staging: checkpoint.Staging | None = None
        self._recorder: recorder.Recorder | None = None
        self._writer = checkpoint.CheckpointWriter()
        self._weights: str | None = None
        self._base: str | None = None

    # A checkpoint's folder.

    def stage(self, run_folder: Path, state: TrainerState) -> None:
        """Direct the next checkpoint to a staging folder; every rank must call this."""
        self.staging = checkpoint.Staging(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if self._config.should_save:
            self.staging.clear()
        best = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if state.best_global_step and best.exists():  # Trainer looks for it in the staging folder
            state.best_model_checkpoint = str(best)
        self._ranks.barrier()

    def publish(self, state: TrainerState) -> str:
        """Move the staged checkpoint to its place when every rank has written its part.

        Returns:
            The checkpoint's final folder.
        """
        assert self.staging is not None
        staging = self.staging
        self._ranks.barrier()
        if state.best_model_checkpoint == str(staging.folder):
            state.best_model_checkpoint = str(staging.final)
        if self._config.should_save:
            state.save_to_json(str(staging.folder / TRAINER_STATE_NAME))
            manifest.write(staging.folder)
            staging.publish()
            self._writer.moved(staging.folder, staging.final)
            # A checkpoint that Trainer asks for in the middle of a step is of the next one, and this folder stays empty.
            with suppress(OSError):
                (staging.run_folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step - 1}").rmdir()
            # Trainer has just looked for old checkpoints in the staging folder, where there are none.
            limit, best = self._config.save_total_limit, state.best_model_checkpoint
            rotate_checkpoints(str(staging.run_folder), limit, best, use_mtime=True)
        return str(staging.final)

    # The engine's part of a checkpoint.

    def note_weights(self, model: nn.Module, state: Mapping[str, Any] | None) -> None:
        """Remember the hash of the weights that are written into the staged checkpoint; None stands for the model's own."""
        if self._config.should_save:
            self._weights = checkpoint.weights_hash_of(model, model.state_dict() if state is None else state)

    def save_engine(
        self,
        zo: ZerothOrder,
        optimizer: Optimizer,
        scheduler: Any,
        folder: Path,
        seconds: float,
        found_learning_rate: float | None,
        data: Mapping[str, int],
        run: Mapping[str, Any] | None,
    ) -> None:
        """Write the engine's files, and a copy of the log if the checkpoint consists of the log.

        Args:
            zo: the engine.
            optimizer: the optimizer of the coordinates.
            scheduler: the schedule of its learning rate.
            folder: the checkpoint's folder.
            seconds: time that the run has taken so far, in seconds.
            found_learning_rate: the rate that `learning_rate="auto"` has found; None without a search.
            data: the position in the data, see `DataPosition`.
            run: the run, see `changes.describe`; None if it is unknown.
        """
        entries: dict[str, Any] = {
            "trajectory": None if self._recorder is None else self._recorder.sync(),
            "seconds": seconds,
            "weights": self._weights,
            "data": dict(data),
            "manifest": manifest.VERSION,
            "base": self._base,
        }
        if run is not None:
            entries["run"] = dict(run)
        if found_learning_rate is not None:
            entries["learning_rate"] = found_learning_rate
        rates = None
        if self._config.save_only_trajectory and self._recorder is not None:
            self._recorder.copy_into(folder)
            torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)
            rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._weights = None
        self._writer.save(zo, folder, entries, rates, self._config.should_save)

    def load_engine(
        self, zo: ZerothOrder, optimizer: Optimizer, scheduler: Any, folder: Path, run: Mapping[str, Any] | None
    ) -> bool:
        """Bring the engine to a checkpoint's step.

        Args:
            zo: the engine.
            optimizer: the optimizer of the coordinates.
            scheduler: the schedule of its learning rate.
            folder: the checkpoint's folder.
            run: the run, see `changes.describe`; None if it is unknown.

        Returns:
            True if Trainer should load its optimizer's state from the checkpoint.

        Raises:
            ValueError: the checkpoint belongs to another run, or holds no run; the message says what to do.
        """
        state = checkpoint.read_state(folder)
        if state and run is not None:
            changes.check_run(zo, run, folder)
        self._base = state.get("base")
        if checkpoint.is_only_trajectory(folder):
            recorder.restore(zo, optimizer, folder)
            scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
            return False
        if checkpoint.load(zo, folder):
            return True
        if becoming_adapter(zo) is not None and checkpoint.holds_adapter(folder):
            raise ValueError(
                f"{folder} holds an adapter and not the run, so it cannot be resumed; load it with "
                "PeftModel.from_pretrained(..., is_trainable=True) and train it with zo_subspace='adapter'."
            )
        # If the checkpoint holds an optimizer's state, that belongs to other parameters than the coordinates.
        logger.warning(
            "%s holds no zeroth-order state; its weights are used, and everything else starts from the beginning",
            folder,
        )
        return False

    # The log.

    @property
    def records(self) -> bool:
        """True while a log is open."""
        return self._recorder is not None

    def begin_log(self, zo: ZerothOrder, optimizer: Optimizer, output_dir: Path, base_hash: str | None) -> None:
        """Start the log of a run whose model, at this moment, is the base; see `recorder.begin`."""
        required = self._config.save_only_trajectory
        log = recorder.begin(zo, optimizer, output_dir, required, base_hash)
        self._base = log.base
        self._record(zo, log)

    def resume_log(self, zo: ZerothOrder, optimizer: Optimizer, output_dir: Path, folder: Path) -> None:
        """Continue the log of the run that wrote a checkpoint; see `recorder.resume`."""
        required = self._config.save_only_trajectory
        self._record(zo, recorder.resume(zo, optimizer, output_dir, folder, required))

    def _record(self, zo: ZerothOrder, log: recorder.Recorder) -> None:
        self._recorder = zo.on_step = log

    def close(self) -> None:
        """Close the log, and forget the last checkpoint's base."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
        self._writer = checkpoint.CheckpointWriter()


class FinishesFirst(TrainerCallback):
    """Ends the engine before any other callback hears that training has ended, so that they see the final parameters.

    Args:
        check: compares the weights of all processes.
        finish: ends the engine.
    """

    def __init__(self, check: Callable[[], None], finish: Callable[[], None]) -> None:
        self._check, self._finish = check, finish

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Compare the weights, fold the coordinates into them, and remove the engine from the model."""
        self._check()
        self._finish()


def becoming_adapter(zo: ZerothOrder | None) -> LowRank | None:
    """Return the subspace if training will end with a LoRA adapter around unchanged weights, else None."""
    subspace = None if zo is None else zo.subspace
    return subspace if isinstance(subspace, LowRank) and subspace.becomes_adapter else None


def save_becoming_adapter(subspace: LowRank, folder: Path, config: ZOConfig, processing_class: Any) -> None:
    """Save a model whose factors will become an adapter, in PEFT's format."""
    save_adapter(folder, subspace.model, subspace.adapter_weights(), subspace.rank)
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    torch.save(config, folder / TRAINING_ARGS_NAME)


def check_saveable(model: nn.Module, config: ZOConfig) -> None:
    """Refuse a run whose first checkpoint could not be written.

    Raises:
        ValueError: the folder cannot be written, or several of the model's own adapters are active, of which transformers
            saves only one.
    """
    if config.save_strategy != "no" and config.should_save:
        check_folder("output_dir", config.output_dir)
    active = model.active_adapters() if has_own_adapter(model) else []  # type: ignore[operator]
    if len(active) > 1 and config.save_strategy != "no" and not config.save_only_trajectory:
        raise ValueError(
            f"transformers saves one active adapter of model.add_adapter, and {', '.join(active)} are active; make them "
            "with peft.get_peft_model, activate one with model.set_adapter, or pass save_strategy='no'."
        )


def load_weights_of(model: nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights into a model, and check that they are all there and as they were written.

    Raises:
        ValueError: they are not, or the model is of another kind; the message names the first difference.
    """
    changes.check_model(model, folder)
    # A checkpoint without tensors is read later, when the engine exists.
    if checkpoint.is_only_trajectory(folder):
        return
    if is_peft(model):
        if not checkpoint.load_adapter(model, folder):
            load_adapters(model, folder)
        # An adapter's own weights are compared when the engine has read them with all of their digits.
        if checkpoint.read_state(folder).get("settings", {}).get("zo_subspace") != Adapter.name:
            checkpoint.check_weights(model, folder)
    elif not (is_quantized(model) and checkpoint.holds_adapter(folder)):  # else the engine reads the factors
        load_weights(model, folder)
        checkpoint.check_weights(model, folder)


def load_best_weights(model: nn.Module, folder: Path) -> nn.Module:
    """Return the model with the best checkpoint's weights: itself, or a PEFT model if factors have become an adapter."""
    if is_quantized(model) and not is_peft(model) and checkpoint.holds_adapter(folder):
        return with_saved_adapter(model, folder)
    load_weights_of(model, folder)
    return model
