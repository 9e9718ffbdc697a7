"""A training up to its first step, undone again: whatever the run would refuse, it refuses before other work is done."""

from __future__ import annotations

from pathlib import Path

from transformers import Trainer, TrainerControl

from zo_hf import checkpoint
from zo_hf.method_info import plain
from zo_hf.trainer import changes, setup
from zo_hf.trainer.checkpoints import check_saveable
from zo_hf.trainer.learning_rate import rate_of_checkpoint
from zo_hf.trainer.lock import locked
from zo_hf.trainer.resuming import to_resume
from zo_hf.trainer.trainer import ZOTrainer


def rehearse(trainer: ZOTrainer, resume_from_checkpoint: str | bool | None = None) -> None:
    """Make everything that a training needs before its first step, and leave the model and the trainer as they were.

    Args:
        trainer: a trainer that does not train yet.
        resume_from_checkpoint: as for `ZOTrainer.train`.

    Raises:
        ValueError: the training would be refused; the message names the argument and the way out.
    """
    setup.check_trainable(trainer.model)
    check_saveable(trainer.model, trainer.args)
    with trainer._together(resume_from_checkpoint):
        _rehearse(trainer, resume_from_checkpoint)


def _rehearse(trainer: ZOTrainer, resume_from_checkpoint: str | bool | None) -> None:
    with locked(Path(trainer.args.output_dir), trainer._ranks, trainer.args.device):
        pass  # another run that uses the folder is noticed now
    folder = to_resume(resume_from_checkpoint, Path(trainer.args.output_dir), trainer._ranks, trainer.args.device)
    trainer._resumed_from = folder
    is_auto = trainer.args.learning_rate == "auto"
    try:
        with trainer._spending(is_auto):
            *_, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
            optimizer = trainer.create_optimizer()
            _check_schedule(trainer, steps, optimizer)
            state = checkpoint.read_state(folder) if folder is not None else {}
            if state and folder is not None and trainer.zo is not None:
                changes.check_model(trainer.model, folder)
                run = changes.describe(
                    trainer.zo, trainer._torch_optimizer(), trainer.args, steps, trainer.train_dataset
                )
                changes.check_run(trainer.zo, run, folder)
                if is_auto:
                    rate_of_checkpoint(folder)
            elif not state:
                trainer._budget.on_train_begin(trainer.args, trainer.state, TrainerControl())
    finally:
        # The weights stay sharded, and no process can compute the hash of the base from its shards.
        base_hash = None if trainer._division is None else trainer._division.base_hash
        trainer._finish_zeroth_order()
        if trainer._division is not None:
            trainer._division.base_hash = base_hash


def _check_schedule(trainer: ZOTrainer, steps: int, optimizer: object) -> None:
    try:
        # Trainer's own method, because ZOTrainer's searches for the learning rate.
        Trainer.create_scheduler(trainer, steps, optimizer)  # type: ignore[arg-type]
    except (TypeError, ValueError, KeyError) as error:
        args = trainer.args
        raise ValueError(
            f"lr_scheduler_type={plain(args.lr_scheduler_type)!r} does not work with "
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs} and {steps} steps ({error}); use 'constant' or 'linear'."
        ) from error
    finally:
        trainer.lr_scheduler = None
