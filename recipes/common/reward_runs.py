"""Runs that learn from rewards, in which a pair of members of its own answers every prompt, and plots of them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from zo_hf import ZOTrainer
from zo_hf.rewards import EvolutionConfig


def config(output: Path, prompts: int, save_steps: int, **options: Any) -> EvolutionConfig:
    """Return the arguments of a run.

    Args:
        output: folder of the checkpoints, each a log of some kilobytes.
        prompts: prompts of a step.
        save_steps: steps between two checkpoints, and between two lines of the log.
        options: further arguments.
    """
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": prompts,
        "population": 2 * prompts,
        "generations_per_prompt": 2,
        "zo_exclude_modules": r".*(embed|norm).*",
    }
    return EvolutionConfig(str(output), **defaults | checkpoints(save_steps) | options)


def checkpoints(save_steps: int) -> dict[str, Any]:
    """Return the options of checkpoints, logs and evaluations of a run that can be interrupted."""
    return {
        "logging_steps": save_steps,
        "save_strategy": "steps",
        "save_steps": save_steps,
        "save_only_trajectory": True,
        "save_total_limit": 1,
        "eval_strategy": "steps",
        "report_to": [],
    }


def run(trainer: ZOTrainer, measured: Callable[[str], dict[str, float]], curve: str, **results: Any) -> None:
    """Measure, train, measure again, and write results.json to the run's folder; an interrupted run goes on.

    Args:
        trainer: the trainer, which evaluates now and then.
        measured: measures the present model, and prints that with the words that it gets. Its first number is the one of
            the evaluations.
        curve: name of this number in the trainer's log.
        results: further entries of results.json.
    """
    output, steps = Path(trainer.args.output_dir), trainer.args.max_steps
    before = measured("zero-shot")
    results |= {"steps": steps, "before": before}
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    log = trainer.state.log_history
    points = [(0, next(iter(before.values()))), *((line["step"], line[curve]) for line in log if curve in line)]
    results |= {"after": measured(f"after {steps} steps"), "curve": points, "log": log}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def plot(folders: Mapping[str, Path], label: str, path: Path) -> None:
    """Draw the curves of finished runs.

    Args:
        folders: folders with a folder for each seed, by the name of their runs.
        label: name of the measured number.
        path: the file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, folder) in enumerate(folders.items()):
        for seed, file in enumerate(sorted(folder.glob("seed-*/results.json"))):
            curve = json.loads(file.read_text(encoding="utf-8"))["curve"]
            axes.plot(*zip(*curve, strict=True), f"C{number}", marker=".", label=None if seed else name)
    axes.set(xlabel="steps", ylabel=label, ylim=(0, 1.02))
    if len(folders) > 1:
        axes.legend()
    figure.savefig(path, dpi=150)
