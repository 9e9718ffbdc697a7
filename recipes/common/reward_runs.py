"""Runs of `EvolutionTrainer` in which every prompt of a step is answered by a pair of members of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from zo_hf.rewards import EvolutionConfig, EvolutionTrainer


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
        "logging_steps": save_steps,
        "save_steps": save_steps,
        "save_only_trajectory": True,
        "save_total_limit": 1,
        "report_to": [],
    }
    return EvolutionConfig(str(output), **defaults | options)


def run(trainer: EvolutionTrainer, measured: Callable[[str], Any], **results: Any) -> None:
    """Measure, train, measure again, and write results.json to the run's folder; an interrupted run goes on.

    Args:
        trainer: the trainer.
        measured: measures the present model, and prints that with the words that it gets.
        results: further entries of results.json.
    """
    output, steps = Path(trainer.args.output_dir), trainer.args.max_steps
    results |= {"steps": steps, "before": measured("zero-shot")}
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    results |= {"after": measured(f"after {steps} steps"), "log": trainer.state.log_history}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
