"""A training job as a command: what is wrong ends it before the first evaluation, and an interrupt says what is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from zo_hf.tasks.console import command
from zo_hf.tasks.refusals import refusals_end_the_command, wrong_arguments_end_the_command
from zo_hf.trainer import manifest
from zo_hf.trainer.config import ZOConfig
from zo_hf.trainer.rehearsal import rehearse
from zo_hf.trainer.trainer import ZOTrainer


def run_as_command(
    parse: Callable[[], tuple[Any, Any]],
    prepare: Callable[[Any, Any], Any],
    build_trainer: Callable[[Any, Any], ZOTrainer],
    run: Callable[[Any, ZOTrainer, Sequence[TrainerCallback]], Any],
) -> None:
    """Run a job. A wrong argument ends it with one sentence and exit code 2.

    Args:
        parse: returns the job's arguments and the trainer's.
        prepare: loads what both name, the task.
        build_trainer: makes the trainer of the task and the trainer's arguments.
        run: evaluates, trains and reports, with further callbacks of the trainer.
    """
    with command():
        with wrong_arguments_end_the_command():
            job, config = parse()
        started = time.time()
        with command(lambda: what_is_kept(config, started)):
            with wrong_arguments_end_the_command():
                task = prepare(job, config)
                trainer = build_trainer(task, config)
                rehearse(trainer, config.resume_from_checkpoint)
            with refusals_end_the_command() as first_step:
                run(task, trainer, [first_step])


def what_is_kept(config: ZOConfig, started: float) -> str:
    """Return what an interrupted run has left in its folder, and how to go on from it.

    Args:
        config: the options of the trainer.
        started: the time at which the command began, in seconds; older checkpoints are of another run.
    """
    lists = Path(config.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{manifest.FILE}")
    written = {path: path.stat().st_mtime for path in lists}
    last = max(written, key=lambda path: written[path], default=None)
    if last is None or written[last] < started:
        return f"no checkpoint was written in {config.output_dir}; --save_strategy steps --save_steps N keeps one every N steps"
    return (
        f"{last.parent} is kept; put --resume_from_checkpoint {last.parent} into the same command to continue from it"
    )
