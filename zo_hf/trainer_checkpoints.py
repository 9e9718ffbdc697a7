"""What a Trainer writes to disk and reads back: checkpoints in a place of their own, the engine's part, the log."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from zo_hf import checkpoint
from zo_hf.budget import Budget
from zo_hf.model_setup import is_peft
from zo_hf.quantization import is_quantized, load_weights
from zo_hf.sharding import Sharding, gathered_state_dict
from zo_hf.subspaces import LowRank
from zo_hf.subspaces.lora import save_adapter, with_saved_adapter
from zo_hf.trajectory import recorder
from zo_hf.zeroth_order import ZerothOrder

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _TrainerLike = Any  # the mixin calls what Trainer has, and is no Trainer itself
else:
    _TrainerLike = object


class CheckpointsMixin(_TrainerLike):
    """The part of `ZOTrainerMixin` that saves and loads."""

    model: Any
    model_wrapped: Any
    zo: ZerothOrder | None
    _checkpoints: checkpoint.CheckpointWriter
    _recorder: recorder.Recorder | None
    _budget: Budget
    _staging: checkpoint.Staging | None = None
    _sharding: Sharding | None = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's, in a folder of its own that takes its place among the checkpoints when all of it is on the disk."""
        self._staging = checkpoint.Staging(
            Path(self._get_output_dir(trial=trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        )
        if self.args.should_save:
            self._staging.clear()
        best = self._staging.run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if (
            self.state.best_global_step and best.exists()
        ):  # where Trainer, which is sent elsewhere below, would find it
            self.state.best_model_checkpoint = str(best)
        self._ranks.wait()
        try:
            super()._save_checkpoint(model, trial)
            self._ranks.wait()  # every rank has written its part
            self._publish_checkpoint(self._staging)
            self._ranks.wait()
        finally:
            self._staging = None

    def _publish_checkpoint(self, staging: checkpoint.Staging) -> None:
        if self.state.best_model_checkpoint == str(staging.folder):
            self.state.best_model_checkpoint = str(staging.final)
        if self.args.should_save:
            self.state.save_to_json(str(staging.folder / TRAINER_STATE_NAME))
            staging.publish()
            self._checkpoints.moved(staging.folder, staging.final)
            # Trainer has just looked for old checkpoints beside the new one, in the staging folder.
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(staging.run_folder), limit, best, use_mtime=True)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(staging.final))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else `_publish_checkpoint` pushes what is then complete
            super()._push_from_checkpoint(checkpoint_folder)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return folder if self._staging is None else str(self._staging.folder.parent)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self._staging is not None and self.args.save_only_trajectory:
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
            return
        if not self.args.should_save and self._sharding is None:
            return
        adapter = self._becoming_adapter()
        if adapter is not None:
            self._save_becoming_adapter(adapter, Path(output_dir or self.args.output_dir))
            return
        if self.zo is not None and state_dict is None:
            state_dict = self.zo.folded_state_dict()
        if self._sharding is not None and state_dict is None:
            state_dict = gathered_state_dict(self.model, frozen=not is_peft(self.model))
        super()._save(output_dir, state_dict)

    def _becoming_adapter(self) -> LowRank | None:
        """The subspace, where training will end with a LoRA adapter around the model instead of with other weights."""
        subspace = None if self.zo is None else self.zo.subspace
        return subspace if isinstance(subspace, LowRank) and subspace.becomes_adapter else None

    def _save_becoming_adapter(self, subspace: LowRank, folder: Path) -> None:
        save_adapter(folder, subspace.model, subspace.adapter_weights(), subspace.rank)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.save_only_trajectory:
            super()._save_optimizer_and_scheduler(output_dir)
        if self.zo is None or not (self.args.should_save or self._sharding is not None):
            return
        crc = None if self._recorder is None else self._recorder.sync()
        rates = None
        if self.args.save_only_trajectory and self._recorder is not None:
            self._recorder.copy_into(Path(output_dir))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
            rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        seconds, write = self._budget.seconds, self.args.should_save
        found = float(self.args.learning_rate) if self._learning_rate_given == "auto" else None
        self._checkpoints.save(self.zo, Path(output_dir), crc, rates, seconds, write, found)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # A checkpoint without tensors is replayed once there is an engine, and one that holds only an adapter is read then.
        folder = Path(resume_from_checkpoint)
        if checkpoint.is_only_trajectory(folder) or checkpoint.load_adapter(model or self.model, folder):
            return
        if not is_quantized(model or self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif not checkpoint.holds_adapter(folder):
            load_weights(model or self.model, folder)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is None or self.zo is None:
            super()._load_optimizer_and_scheduler(folder)
            return
        path = Path(folder)
        if checkpoint.is_only_trajectory(path):
            recorder.restore(self.zo, self._torch_optimizer(), path)
            self.lr_scheduler.load_state_dict(torch.load(path / SCHEDULER_NAME, weights_only=True))
        elif checkpoint.load(self.zo, path):
            super()._load_optimizer_and_scheduler(folder)
        elif self._becoming_adapter() is not None and checkpoint.holds_adapter(path):
            raise ValueError(
                f"{path} holds an adapter and not the run, so it cannot be resumed; load it with "
                "PeftModel.from_pretrained(..., is_trainable=True) and go on with zo_subspace='adapter'."
            )
        else:
            # An optimizer's state that is there belongs to other parameters than the coordinates.
            logger.warning("%s holds no zeroth-order state; its weights are used and the rest starts anew", folder)
            return
        self._budget.seconds_before = checkpoint.read_state(path).get("seconds", 0.0)
        if self.args.should_save:
            output_dir, required = self._where_to_record()
            self._record_to(recorder.resume(self.zo, self._torch_optimizer(), output_dir, path, required))

    def _where_to_record(self) -> tuple[Path, bool]:
        """The run's folder, and whether its checkpoints depend on the log."""
        return Path(self._get_output_dir(getattr(self, "_trial", None))), self.args.save_only_trajectory

    def _load_best_model(self) -> None:
        # The engine's coordinates belong to the last step's weights, which are about to be replaced.
        if self.zo is not None:
            self.zo.subspace.detach()
            self._forget_engine()
        best = Path(str(self.state.best_model_checkpoint))
        if not is_quantized(self.model):
            if not checkpoint.load_adapter(self.model, best):
                super()._load_best_model()
        elif checkpoint.holds_adapter(best):
            self.model = self.model_wrapped = with_saved_adapter(self.model, best)
        else:
            load_weights(self.model, best)
