"""Fine-tune a language model on chats and instructions, with forward passes only.

    zo-hf sft --offline               SmolLM2-135M-Instruct on embedded conversions between units, without a hub
    zo-hf sft --model_name_or_path MODEL --train_file chat.jsonl
    zo-hf sft --train_file chat.jsonl --use_peft --load_in_4bit --packing

Every row of the file has `messages`, or `prompt` and `completion`, or `text`. The loss is on the completion if there is one.
With --assistant_only_loss it is on the messages of the assistant. TRL's SFTTrainer tokenizes and batches the rows, and
computes the loss. The default learning rate is 1e-4 with the default method, and ZOConfig's otherwise, as with --use_peft.

The command prints the loss on held-out rows before and after training, the number of forward passes, the training time, and
the peak memory of training and of inference. It saves the trained model with its tokenizer and chat.json (see `zo-hf chat`),
a model card, metrics.json and run.png in --output_dir.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from zo_hf.checkpoint import holds_adapter
from zo_hf.memory.peak import PeakMemory
from zo_hf.tasks.console import command
from zo_hf.tasks.job_command import run_as_command
from zo_hf.tasks.job_model import quantization_of
from zo_hf.tasks.job_run import Spent, line_printer, print_cost, train, write_results
from zo_hf.tasks.progress import LatestValuesBar
from zo_hf.tasks.run_plot import plot_losses
from zo_hf.tasks.saved_chat import save_chat
from zo_hf.tasks.sft_arguments import parse_sft_arguments, sft_classes
from zo_hf.tasks.sft_task import SftTask, prepare
from zo_hf.trainer.trainer import ZOTrainer


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Run the job as a command. A wrong argument ends it with one sentence and exit code 2.

    Args:
        argv: the command line without the program's name.
        prog: the program's name in the help.
    """
    run_as_command(lambda: parse_sft_arguments(argv, prog, __doc__), prepare, build_trainer, run)


def build_trainer(task: SftTask, config: Any) -> ZOTrainer:
    """Build TRL's SFTTrainer, made forward-only, on the rows."""
    with _quiet_data_sets():
        trainer: ZOTrainer = sft_classes()[0](
            model=task.model,
            args=config,
            train_dataset=datasets.Dataset.from_list(task.train.rows),
            eval_dataset=datasets.Dataset.from_list(task.held_out.rows) if task.held_out else None,
            processing_class=task.tokenizer,
        )
    trainer.remove_callback(PrinterCallback)
    if not config.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(
            LatestValuesBar({"loss": "loss", "eval_loss": "held out", "zo/forward_passes": "forward passes"})
        )
    return trainer


@contextmanager
def _quiet_data_sets() -> Iterator[None]:
    """Show no bar for each of the passes over the rows, which TRL makes."""
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()


def run(task: SftTask, trainer: Any, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Evaluate, train, evaluate again and write to the trainer's `output_dir`; return the content of metrics.json.

    Args:
        task: the model and the rows.
        trainer: the trainer that `build_trainer` made for them.
        callbacks: further callbacks of the trainer.
    """
    config = trainer.args
    print_line = line_printer(config)
    with PeakMemory() as inference_memory:
        before = _evaluated(task, trainer)
    if before is not None:
        print_line(f"before     {_in_words(before)}")

    spent = train(trainer, callbacks)
    with command(lambda: f"the trained model is saved in {config.output_dir}, and its evaluation is not"):
        return report(task, trainer, before, spent, inference_memory.mib)


def report(
    task: SftTask, trainer: Any, before: dict[str, float] | None, spent: Spent, inference_mib: float
) -> dict[str, Any]:
    """Evaluate the trained model, print and write the results, and return the content of metrics.json.

    Args:
        task: the model and the rows.
        trainer: the trainer, after training.
        before: the evaluation before training; None without held-out rows.
        spent: what the training took.
        inference_mib: peak memory of inference in MiB; without held-out rows it has no meaning.
    """
    config = trainer.args
    print_line = line_printer(config)
    history = list(trainer.state.log_history)
    after = _evaluated(task, trainer)
    if after is not None:
        print_line(f"after      {_in_words(after)}")
        if before is not None and not after["eval_loss"] < before["eval_loss"]:
            print_line("worse      the held-out loss has not fallen; try a lower --learning_rate")
    print_cost(trainer, spent, None if before is None else inference_mib)

    metrics = {
        "model": task.model_name,
        "rows": task.train.name,
        "train_rows": len(task.train.rows),
        "held_out_rows": 0 if task.held_out is None else len(task.held_out.rows),
        "forward_passes": spent.forward_passes,
        "training_seconds": spent.seconds,
        "training_peak_mib": spent.training_mib,
    }
    if before is not None and after is not None:
        metrics |= {"loss_before": before["eval_loss"], "loss": after["eval_loss"]}
        metrics["inference_peak_mib"] = inference_mib
    if trainer.is_world_process_zero():
        folder = Path(config.output_dir)
        trainer.create_model_card(model_name=folder.resolve().name)
        save_chat(folder, task.train.is_chat, quantization_of(task.model) if holds_adapter(folder) else None)
        losses = None if before is None or after is None else (before["eval_loss"], after["eval_loss"])
        write_results(folder, metrics, "README.md, chat.json", lambda path: plot_losses(history, losses, path))
        print_line(f"try        zo-hf chat {folder}")
    return metrics


def _evaluated(task: SftTask, trainer: Any) -> dict[str, float] | None:
    return None if task.held_out is None else trainer.evaluate()


def _in_words(metrics: dict[str, float]) -> str:
    accuracy = metrics["eval_mean_token_accuracy"]
    return (
        f"{metrics['eval_loss']:.4f} loss on held-out rows, {accuracy:.3f} of their tokens are the most probable ones"
    )
