"""A run of a training job: the training with what it took, the lines that it prints, and the files at its end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from zo_hf.lr_finder.report import one_line
from zo_hf.memory.peak import PeakMemory
from zo_hf.trainer.config import ZOConfig
from zo_hf.trainer.trainer import ZOTrainer

#: The files of a job beside the model.
METRICS, PLOT = "metrics.json", "run.png"


@dataclass(frozen=True)
class Spent:
    """Time of a training in seconds, its forward passes, and its peak memory in MiB."""

    seconds: float
    forward_passes: float
    training_mib: float


def train(
    trainer: ZOTrainer, callbacks: Sequence[TrainerCallback], within: AbstractContextManager[Any] | None = None
) -> Spent:
    """Train and save the model.

    Args:
        trainer: the trainer.
        callbacks: further callbacks of it.
        within: a context for the training alone.
    """
    for callback in callbacks:
        trainer.add_callback(callback)
    started = time.perf_counter()
    with PeakMemory() as memory, nullcontext() if within is None else within:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    seconds = time.perf_counter() - started
    trainer.save_model()  # first of all, so that nothing that follows can lose it
    counts = [entry["zo/forward_passes"] for entry in trainer.state.log_history if "zo/forward_passes" in entry]
    return Spent(seconds, counts[-1] if counts else float("nan"), memory.mib)


def line_printer(config: ZOConfig) -> Callable[[str], None]:
    """Return a function that prints a line on the first process, and does nothing on the others."""
    is_first = config.process_index == 0

    def print_line(line: str) -> None:
        if is_first:
            print(line, flush=True)

    return print_line


def print_cost(trainer: ZOTrainer, spent: Spent, inference_mib: float | None) -> None:
    """Print the learning rate that was found, and what the training took.

    Args:
        trainer: the trainer, after training.
        spent: what it took.
        inference_mib: peak memory of inference in MiB; None if there was none.
    """
    print_line = line_printer(trainer.args)
    if trainer.found_learning_rate is not None:
        print_line(f"rate       {one_line(trainer.found_learning_rate)}")
    print_line(f"cost       {spent.forward_passes:.0f} forward passes, {spent.seconds:.0f} s")
    inference = "" if inference_mib is None else f", {inference_mib:.0f} MiB in inference"
    print_line(f"memory     {spent.training_mib:.0f} MiB peak in training{inference}")


def write_results(folder: Path, metrics: Mapping[str, Any], files: str, plot: Callable[[Path], None]) -> None:
    """Write metrics.json and run.png, and print what is in the folder.

    Args:
        folder: the folder of the trained model.
        metrics: the content of metrics.json.
        files: names of the other files there, for display.
        plot: plots the run into a file; called if matplotlib is installed.
    """
    (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(f"written    {folder}: the model, {files}, {METRICS}", flush=True)
    if find_spec("matplotlib") is None:
        print(f"no plot    install matplotlib for {PLOT}", flush=True)
        return
    plot(folder / PLOT)
    print(f"plotted    {folder / PLOT}", flush=True)
