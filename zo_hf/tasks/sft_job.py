"""Fine-tune a language model on chats and instructions, with forward passes only.

    zo-hf sft --offline               SmolLM2-135M-Instruct on embedded conversions between units, without a hub
    zo-hf sft --model_name_or_path MODEL --train_file chat.jsonl
    zo-hf sft --train_file chat.jsonl --use_peft --load_in_4bit --packing

Every row of the file has `messages`, or `prompt` and `completion`, or `text`. The loss is on the completion if there is one.
With --assistant_only_loss it is on what the assistant says. TRL's SFTTrainer makes tokens and batches of the rows, and
computes the loss; all of its options work.

The command prints the loss on held-out rows before and after training, the forward passes and the time that training took,
and the peak memory of training and of inference. It saves the trained model with its tokenizer and chat.json (see
`zo-hf chat`), a model card, metrics.json and run.png in --output_dir.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from zo_hf.checkpoint import holds_adapter
from zo_hf.lr_finder.report import one_line
from zo_hf.memory.peak import PeakMemory
from zo_hf.tasks.assets import default_model, loaded_asset
from zo_hf.tasks.chat_rows import ChatRows, check_same_format, read_rows, split_rows
from zo_hf.tasks.chat_tokens import lengths, mark_assistant, use_template
from zo_hf.tasks.job_model import load_config, load_model, load_tokenizer, quantization_of
from zo_hf.tasks.loading import Loaded
from zo_hf.tasks.packing import keeps_rows_apart
from zo_hf.tasks.progress import LatestValuesBar
from zo_hf.tasks.refusals import refusals_end_the_command, wrong_arguments_end_the_command
from zo_hf.tasks.run_plot import plot_losses
from zo_hf.tasks.saved_chat import save_chat
from zo_hf.tasks.sentiment_job import last_logged, line_printer
from zo_hf.tasks.sft_arguments import SftArguments, parse_sft_arguments, sft_classes
from zo_hf.tasks.sources import EMBEDDED_MODEL
from zo_hf.trainer.rehearsal import rehearse
from zo_hf.trainer.setup import check_model
from zo_hf.trainer.trainer import ZOTrainer

INSTRUCTIONS = Path(__file__).parent / "instructions" / "conversions.jsonl"


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Run the job as a command. A wrong argument ends it with one sentence and exit code 2.

    Args:
        argv: the command line without the program's name.
        prog: the program's name in the help.
    """
    with wrong_arguments_end_the_command():
        job, config = parse_sft_arguments(argv, prog, __doc__)
        task = prepare(job, config)
        trainer = build_trainer(task, config)
        rehearse(trainer, config.resume_from_checkpoint)
    with refusals_end_the_command() as first_step:
        run(task, trainer, [first_step])


@dataclass(frozen=True)
class SftTask:
    """The model and the rows of a job.

    Attributes:
        model_name: the model's name for display.
        model: the model, inside a PEFT model if an adapter is trained.
        tokenizer: the model's tokenizer, with the chat template that is used.
        train: the rows to train on.
        held_out: the rows to evaluate on; None without any.
    """

    model_name: str
    model: Any
    tokenizer: Any
    train: ChatRows
    held_out: ChatRows | None


def prepare(job: SftArguments, config: Any) -> SftTask:
    """Read and check the rows, and then load the model.

    Raises:
        AssetError, OSError, ValueError: the model, the rows, the chat template and the options do not go together.
    """
    print_line = line_printer(config)
    train, held_out = _rows(job, config)

    if job.model_name_or_path is None:
        print_line(f"no --model_name_or_path: using the embedded {EMBEDDED_MODEL}.")
    with config.main_process_first(desc="fetching the model"):
        tokenizer, model_config = _load(job, lambda path: (load_tokenizer(path, job), load_config(path, job)))
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"--eos_token {config.eos_token} is no token of the tokenizer; name one that is.")
        tokenizer.eos_token = config.eos_token
    use_template(tokenizer, config.chat_template_path, train, print_line)
    _check_lengths(model_config, config, tokenizer, [part for part in (train, held_out) if part], print_line)
    with config.main_process_first(desc="loading the model"):
        model = _load(job, lambda path: load_model(path, job, config))
    if config.packing and config.packing_strategy != "wrapped" and not keeps_rows_apart(model):
        raise ValueError(
            f"--packing does not work with {type(model).__name__}, in which rows of one sequence see each other; leave it out."
        )
    check_model(model, config)  # says now what training would say later
    name = job.model_name_or_path or EMBEDDED_MODEL
    print_line(f"model      {name}, {model.num_parameters() / 1e6:.0f}M parameters, on {config.device}")
    number = 0 if held_out is None else len(held_out.rows)
    print_line(f"rows       {train.name}, {train.in_words}: {len(train.rows)} to train on, {number} held out")
    return SftTask(name, model, tokenizer, train, held_out)


def _rows(job: SftArguments, config: Any) -> tuple[ChatRows, ChatRows | None]:
    """The rows to train on, and those held out; the losses that are asked for go with them."""
    path = INSTRUCTIONS if job.train_file is None else Path(job.train_file)
    rows = read_rows("--train_file", path, config.dataset_text_field)
    if config.completion_only_loss and "completion" not in rows.columns:
        raise ValueError(
            f"--completion_only_loss needs rows of prompt and completion, and {rows.name} has {rows.in_words}; leave it out."
        )
    if job.eval_file is None:
        return split_rows(rows, job.eval_fraction, config.seed)
    held_out = read_rows("--eval_file", Path(job.eval_file), config.dataset_text_field)
    check_same_format("--eval_file", held_out, rows)
    return rows, held_out


def _load(job: SftArguments, load: Callable[[str], Loaded]) -> Loaded:
    """Call `load` with the argument for `from_pretrained`; the embedded model is fetched first."""
    if job.model_name_or_path is None:
        return loaded_asset(default_model, lambda path: load(str(path)))
    return load(job.model_name_or_path)


def _check_lengths(
    model_config: Any, config: Any, tokenizer: Any, parts: list[ChatRows], print_line: Callable[[str], None]
) -> None:
    """Cut rows to what the model has positions for, and say how many are cut."""
    if config.max_length is not None and config.max_length < 1:
        raise ValueError(f"--max_length {config.max_length} is not above 0; give a whole number from 1.")
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)  # not every model has some
    why = "--max_length"
    if positions is not None and (config.max_length is None or config.max_length > positions):
        config.max_length = positions
        why = "all that the model has positions for"
    loss = "completion" if config.completion_only_loss is not False and "completion" in parts[0].columns else "all"
    templates: list[str | None] = [None]
    if config.assistant_only_loss:
        loss = "assistant"
        templates = [mark_assistant(tokenizer, rows) for rows in parts]
    splits = config.packing and config.packing_strategy != "bfd"  # then what is too long goes on in the next sequence
    most = 1 << 62 if config.max_length is None or splits else config.max_length
    for rows in parts:
        found = lengths(tokenizer, rows, most, loss, templates[0])
        if found.cut:
            print_line(
                f"cut        {found.cut} of {found.rows} rows have more than {config.max_length} tokens ({why})"
            )
        if found.left_out:
            print_line(f"left out   {found.left_out} of them have no token of the loss among those")


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

    for callback in callbacks:
        trainer.add_callback(callback)
    started = time.perf_counter()
    with PeakMemory() as training_memory:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    training_seconds = time.perf_counter() - started
    history = list(trainer.state.log_history)
    forward_passes = last_logged(history, "zo/forward_passes")
    after = _evaluated(task, trainer)
    if after is not None:
        print_line(f"after      {_in_words(after)}")
        if before is not None and not after["eval_loss"] < before["eval_loss"]:
            print_line("worse      the held-out loss has not fallen; try a lower --learning_rate")
    if trainer.found_learning_rate is not None:
        print_line(f"rate       {one_line(trainer.found_learning_rate)}")
    print_line(f"cost       {forward_passes:.0f} forward passes, {training_seconds:.0f} s")
    memory = "" if before is None else f", {inference_memory.mib:.0f} MiB in inference"
    print_line(f"memory     {training_memory.mib:.0f} MiB peak in training{memory}")

    metrics = {
        "model": task.model_name,
        "rows": task.train.name,
        "train_rows": len(task.train.rows),
        "held_out_rows": 0 if task.held_out is None else len(task.held_out.rows),
        "forward_passes": forward_passes,
        "training_seconds": training_seconds,
        "training_peak_mib": training_memory.mib,
    }
    if before is not None and after is not None:
        metrics |= {"loss_before": before["eval_loss"], "loss": after["eval_loss"]}
        metrics["inference_peak_mib"] = inference_memory.mib
    trainer.save_model()
    if trainer.is_world_process_zero():
        folder = Path(config.output_dir)
        trainer.create_model_card(model_name=folder.resolve().name)
        save_chat(folder, task.train.is_chat, quantization_of(task.model) if holds_adapter(folder) else None)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        print_line(f"written    {folder}: the model, README.md, chat.json, metrics.json")
        if find_spec("matplotlib") is None:
            print_line("no plot    install matplotlib for run.png")
        else:
            losses = None if before is None or after is None else (before["eval_loss"], after["eval_loss"])
            plot_losses(history, losses, folder / "run.png")
            print_line(f"plotted    {folder / 'run.png'}")
        print_line(f"try        zo-hf chat {folder}")
    return metrics


def _evaluated(task: SftTask, trainer: Any) -> dict[str, float] | None:
    return None if task.held_out is None else trainer.evaluate()


def _in_words(metrics: dict[str, float]) -> str:
    accuracy = metrics["eval_mean_token_accuracy"]
    return (
        f"{metrics['eval_loss']:.4f} loss on held-out rows, {accuracy:.3f} of their tokens are the most probable ones"
    )
