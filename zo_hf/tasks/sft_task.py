"""The task of `zo-hf sft`, read and checked in this order: the rows, the tokenizer, its chat template, the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_hf.tasks.assets import default_model, loaded_asset
from zo_hf.tasks.chat_rows import ChatRows, check_same_format, read_rows, split_rows
from zo_hf.tasks.chat_tokens import lengths, mark_assistant, use_template
from zo_hf.tasks.job_model import load_config, load_model, load_tokenizer
from zo_hf.tasks.job_run import METRICS, PLOT, line_printer
from zo_hf.tasks.loading import Loaded
from zo_hf.tasks.packing import keeps_rows_apart
from zo_hf.tasks.saved_chat import FILE_NAME
from zo_hf.tasks.sft_arguments import SftArguments
from zo_hf.tasks.sources import EMBEDDED_MODEL
from zo_hf.trainer.output_paths import check_folder
from zo_hf.trainer.setup import check_model

#: Files that a run writes at its end, beside the model.
WRITTEN = ("README.md", FILE_NAME, METRICS, PLOT)

INSTRUCTIONS = Path(__file__).parent / "instructions" / "conversions.jsonl"


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
    if config.should_save:
        check_folder("--output_dir", config.output_dir, *WRITTEN)
    train, held_out = _rows(job, config)

    if job.model_name_or_path is None:
        print_line(f"no --model_name_or_path: using the embedded {EMBEDDED_MODEL}.")
    with config.main_process_first(desc="fetching the model"):
        tokenizer, model_config = _load(job, lambda path: (load_tokenizer(path, job), load_config(path, job)))
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"--eos_token {config.eos_token} is not a token of the tokenizer; name one that is.")
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
    check_same_format(held_out, rows)
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
        raise ValueError(f"--max_length {config.max_length} must be at least 1.")
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
