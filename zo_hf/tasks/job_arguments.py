"""The options of the fine-tuning job, and its defaults for the options of the trainer."""

import difflib
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from zo_hf.method_info import Choice, Whole, checked
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.job_help import ReadableHelp, add_help
from zo_hf.tasks.prompts import PROMPT_A
from zo_hf.trainer.argument_values import values_of_type
from zo_hf.trainer.config import ZOConfig

# The job's defaults for options of ZOConfig. Options that are not named here have ZOConfig's own defaults.
RECIPE = {
    "output_dir": "out",
    "max_steps": 250,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "optim": "sgd",
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    # Only linear layers move. A step would move all rows of an embedding, most of which belong to words not in its
    # batch.
    "zo_exclude_modules": r".*(embed|norm).*",
    # As the published runs of this job. A direction for every row has not been measured on it.
    "zo_rows_per_direction": 0,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": False,
}

HUB_MODEL = "facebook/opt-125m"
HUB_DATASET = "stanfordnlp/sst2"


@dataclass
class JobArguments:
    """The model, the sentences and the prompt of the job."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": f"a causal language model: hub name or folder ({HUB_MODEL}; without a hub, SmolLM2-135M)"},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "dtype of the weights", "choices": ["float32", "bfloat16", "float16", "auto"]},
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "quantize the model's linear layers to int8 (bitsandbytes)"}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "quantize the model's linear layers to nf4 (bitsandbytes)"}
    )
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "also quantize the scales of nf4"})
    use_peft: bool = field(
        default=False, metadata={"help": "train a LoRA adapter of PEFT; the weights of the base model do not change"}
    )
    lora_r: int = field(default=8, metadata={"help": "rank of the LoRA adapter"})
    lora_alpha: int = field(default=16, metadata={"help": "alpha of the LoRA adapter; its scale is alpha / rank"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "endings of the names of the layers with an adapter"}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": f"a data set on the hub ({HUB_DATASET}; without a hub, Rotten Tomatoes sentences)"},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of that data set"})
    train_file: str | None = field(
        default=None, metadata={"help": "a local .csv, .tsv, .json or .jsonl file instead of a data set on the hub"}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "file of held-out sentences; by default, they are a part of --train_file"}
    )
    text_column: str | None = field(
        default=None, metadata={"help": "column with the text; by default, `sentence` or else `text`"}
    )
    label_column: str = field(default="label", metadata={"help": "column with the labels 0, 1, ..."})
    template: str = field(default=PROMPT_A.template, metadata={"help": "the prompt, with {text} for the sentence"})
    verbalizers: list[str] = field(
        default_factory=lambda: list(PROMPT_A.verbalizers),
        metadata={"help": "the word for label 0, 1, ..., each with its leading space"},
    )
    loss: str = field(
        default="label_words",
        metadata={
            "help": "cross entropy among the label words alone, or over the whole vocabulary",
            "choices": ["label_words", "vocabulary"],
        },
    )
    max_length: int = field(
        default=64,
        metadata={"help": "maximum number of tokens in prompt, sentence and label; longer sentences are cut"},
    )
    num_train_examples: int = field(default=1000, metadata={"help": "maximum number of training sentences"})
    num_eval_examples: int = field(default=400, metadata={"help": "maximum number of held-out sentences"})
    num_progress_examples: int = field(
        default=100,
        metadata={"help": "number of held-out sentences that are scored every --eval_steps while training"},
    )
    offline: bool = field(
        default=False, metadata={"help": "never contact the hub; use the embedded model and sentences by default"}
    )

    def __post_init__(self) -> None:
        for part in fields(self):
            value, choices = getattr(self, part.name), part.metadata.get("choices")
            if value is None and part.default is None:  # HfArgumentParser takes None out of the types
                continue
            values = Choice(tuple(choices)) if choices is not None else values_of_type(part.type)
            if part.type is int:
                values = Whole(1)
            assert values is not None, part
            setattr(self, part.name, checked(f"--{part.name}", value, values, "leave it out for the default"))
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("--load_in_8bit and --load_in_4bit are two formats; give one of them.")
        if self.use_bnb_nested_quant and not self.load_in_4bit:
            raise ValueError("--use_bnb_nested_quant quantizes the scales of 4-bit layers; also give --load_in_4bit.")
        if self.train_file and self.dataset_name:
            raise ValueError("--train_file and --dataset_name name two sources of sentences; give one of them.")
        if self.validation_file and not self.train_file:
            raise ValueError("--validation_file needs --train_file; give both.")


class _JobParser(CommandParser, HfArgumentParser):
    """Makes an option of every field of the given dataclasses."""


def parse_arguments(
    argv: list[str] | None, prog: str | None, description: str | None, config: Path | None = None
) -> tuple[JobArguments, ZOConfig]:
    """Parse a command line into the options of the job and of the trainer, with `RECIPE` as defaults.

    Args:
        argv: the command line without the program's name; None means `sys.argv[1:]`.
        prog: the program's name in the help.
        description: the text at the top of the help.
        config: a YAML file with other defaults, used unless the command line names one with --config.

    Raises:
        ValueError: the file cannot be read or names an unknown option, or an option has a wrong value.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _JobParser(
        [JobArguments, ZOConfig],
        prog=prog,
        usage="%(prog)s [options]",
        description=description,
        formatter_class=ReadableHelp,
        add_help=False,
    )
    add_help(parser)
    parser.add_argument(
        "--config",
        type=Path,
        help="a YAML file of these options; options on the command line override it",
        default=config,
    )
    parser.set_defaults(**RECIPE)
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    values = vars(parser.parse_args(argv))
    file = values["config"]
    if file is not None:
        options = read_options(file, {part.name for part in (*fields(JobArguments), *fields(ZOConfig)) if part.init})
        parser.set_defaults(**options)
        given |= options.keys() if file != config else set()
        values = vars(parser.parse_args(argv))
    if values["zo_max_forward_passes"] is not None and "max_steps" not in given:
        values["max_steps"] = -1  # the number of steps follows from the forward passes
    if values["zo_estimator"] != "two_point" and "learning_rate" not in given:
        values["learning_rate"] = None  # the default rate is for two-point estimates along random directions
    if values["zo_subspace"] == "norms" and values["zo_exclude_modules"] == RECIPE["zo_exclude_modules"]:
        values["zo_exclude_modules"] = None
    job, arguments = parser.parse_dict(values, allow_extra_keys=True)
    return job, arguments


MAX_VALUES = 10_000


def read_options(path: Path, known: set[str]) -> dict[str, Any]:
    """Read options from a YAML file.

    Raises:
        ValueError: the file cannot be read, or names an option that is not in `known`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        options, node = yaml.safe_load(text) or {}, yaml.compose(text)
    except (OSError, UnicodeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--config {path} cannot be read ({reason}); give a YAML file of `option: value`.") from error
    if not isinstance(options, dict):
        raise ValueError(f"--config {path} must consist of lines `option: value`.")
    for name in options:
        if name not in known:
            alike = difflib.get_close_matches(str(name), known, 1)
            advice = f"write {alike[0]!r} if you mean that" if alike else "--help lists the options"
            raise ValueError(f"--config {path} has an unknown option {name!r}; {advice}.")
    # The last of two lines would win silently.
    keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    for name in keys:
        if keys.count(name) > 1:
            raise ValueError(f"--config {path} has {name!r} twice; give it once.")
    if _is_larger(options, MAX_VALUES):
        raise ValueError(f"--config {path} has more than {MAX_VALUES} values; write each value where it belongs.")
    return options


def _is_larger(content: Any, limit: int) -> bool:
    """Return whether YAML's content has more than `limit` values; an alias counts each time, as whoever prints it does."""
    left, count = [content], 0
    while left and count <= limit:
        value = left.pop()
        count += 1
        if isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
    return count > limit
