"""What the fine-tuning job is told: its options, and the recipe's defaults for the trainer's."""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from zo_hf.config import ZOConfig
from zo_hf.tasks.prompts import PROMPT_A

# The recipe: how the job trains unless an option says otherwise. Options not named here have ZOConfig's defaults.
RECIPE = {
    "output_dir": "out",
    "max_steps": 250,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "optim": "sgd",
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    # The linear layers: every step moves all rows of an embedding, and most of them belong to words it has not seen.
    "zo_exclude_modules": r".*(embed|norm).*",
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
    """Which model learns to label which sentences."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": f"a causal language model: hub name or folder ({HUB_MODEL}; without a hub, SmolLM2-135M)"},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "of the weights", "choices": ["float32", "bfloat16", "float16", "auto"]},
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "quantise the model's linear layers to int8 (bitsandbytes)"}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "quantise them to nf4 (bitsandbytes)"})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "quantise the scales of nf4 too"})
    use_peft: bool = field(default=False, metadata={"help": "train a LoRA adapter of PEFT's, the base stays as it is"})
    lora_r: int = field(default=8, metadata={"help": "its rank"})
    lora_alpha: int = field(default=16, metadata={"help": "its scale, times its rank"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "endings of the names of the layers that get it"}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": f"a dataset on the hub ({HUB_DATASET}; without a hub, Rotten Tomatoes sentences)"},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of that dataset"})
    train_file: str | None = field(
        default=None, metadata={"help": "a local .csv, .tsv, .json or .jsonl file instead of a dataset on the hub"}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "held-out sentences of --train_file; without it, a part of that file"}
    )
    text_column: str | None = field(
        default=None, metadata={"help": "column with the text (`sentence` or `text`, the first there is)"}
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
    max_length: int = field(default=64, metadata={"help": "tokens of prompt, sentence and label; longer text is cut"})
    num_train_examples: int = field(default=1000, metadata={"help": "training sentences, at most"})
    num_eval_examples: int = field(default=400, metadata={"help": "held-out sentences, at most"})
    num_progress_examples: int = field(
        default=100, metadata={"help": "held-out sentences scored every --eval_steps while training"}
    )
    offline: bool = field(default=False, metadata={"help": "never ask the hub: the embedded model and sentences"})

    def __post_init__(self) -> None:
        for name in ("num_train_examples", "num_eval_examples", "num_progress_examples", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1.")
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("--load_in_8bit and --load_in_4bit are two formats: give one of them.")
        if self.use_bnb_nested_quant and not self.load_in_4bit:
            raise ValueError("--use_bnb_nested_quant quantises the scales of 4-bit layers: give --load_in_4bit too.")
        if self.lora_r < 1:
            raise ValueError(f"--lora_r {self.lora_r} must be at least 1.")
        if self.train_file and self.dataset_name:
            raise ValueError("--train_file and --dataset_name name two sources of sentences: give one of them.")
        if self.validation_file and not self.train_file:
            raise ValueError("--validation_file holds out sentences of --train_file: give that too.")


class _ReadableHelp(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The description as it is written, and each option's default."""


def parse_arguments(
    argv: list[str] | None, prog: str | None, description: str | None, config: Path | None = None
) -> tuple[JobArguments, ZOConfig]:
    """Parse a command line into the job's and the trainer's options; the recipe's values are the defaults.

    Args:
        config: a YAML file with other defaults, unless the command line names one with --config.

    Raises:
        ValueError: that file cannot be read, or names an option that there is not.
    """
    argv = sys.argv[1:] if argv is None else argv
    before = ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", type=Path, default=config)
    named, rest = before.parse_known_args(argv)
    parser = HfArgumentParser(
        [JobArguments, ZOConfig],
        prog=prog,
        usage="%(prog)s [options]",
        description=description,
        formatter_class=_ReadableHelp,
    )
    parser.add_argument("--config", help="a YAML file of these options; the command line wins", default=config)
    parser.set_defaults(**RECIPE)
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in rest if word.startswith("--")}
    if named.config is not None:
        options = read_options(named.config, {action.dest for action in parser._actions})
        parser.set_defaults(**options)
        given |= options.keys() if named.config != config else set()
    job, arguments, _ = parser.parse_args_into_dataclasses(args=rest)
    if arguments.zo_max_forward_passes is not None and "max_steps" not in given:
        arguments.max_steps = -1  # they say how many there are
    if arguments.zo_estimator != "two_point" and "learning_rate" not in given:
        arguments.learning_rate = None  # the recipe's is for slopes along random directions
    if arguments.zo_subspace == "norms" and arguments.zo_exclude_modules == RECIPE["zo_exclude_modules"]:
        arguments.zo_exclude_modules = None
    return job, arguments


def read_options(path: Path, known: set[str]) -> dict[str, Any]:
    """The options of a YAML file.

    Raises:
        ValueError: it cannot be read, or names an option that is not in `known`.
    """
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {str(error).splitlines()[0]}.") from error
    if not isinstance(options, dict):
        raise ValueError(f"--config {path} must hold lines of `option: value`.")
    for name in options:
        if name not in known:
            raise ValueError(f"--config {path} has an option {name!r} that there is not: see --help.")
    return options
