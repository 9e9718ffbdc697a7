"""The options of `zo-hf sft`, and its defaults for the options of the trainer."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from transformers import IntervalStrategy

from zo_hf.tasks.job_options import parse_options
from zo_hf.tasks.model_arguments import ModelArguments

# The job's defaults for options of the config. Options that are not named here have the defaults of ZOConfig and TRL.
RECIPE = {
    "output_dir": "out",
    "max_steps": 250,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "optim": "sgd",
    "lr_scheduler_type": "linear",
    # As in `zo-hf train`: a step would move all rows of an embedding, most of which belong to words not in its batch.
    "zo_exclude_modules": r".*(embed|norm).*",
    "zo_rows_per_direction": 0,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": False,
    # TRL computes in bfloat16 by default, in which the two losses of a step differ by less than their rounding. The
    # weights are in --dtype.
    "bf16": False,
}

#: The rate of weights in low-rank coordinates, unless another is given. On the embedded model and rows, three times as much
#: learned faster, and ten times as much diverged.
LOW_RANK_RATE = 1e-4

#: The options of `zo-hf sft --help`, by group.
NEEDED = {
    "model": ("model_name_or_path", "dtype", "load_in_8bit", "load_in_4bit", "use_peft", "lora_r", "offline"),
    "rows": ("train_file", "eval_file", "eval_fraction", "max_length", "packing", "chat_template_path"),
    "training": (
        "output_dir",
        "max_steps",
        "zo_max_forward_passes",
        "per_device_train_batch_size",
        "learning_rate",
        "lr_scheduler_type",
        "assistant_only_loss",
        "completion_only_loss",
        "optim",
        "eval_steps",
        "seed",
        "resume_from_checkpoint",
    ),
    "method": ("zo_subspace", "zo_rank", "zo_fold_steps", "zo_estimator", "zo_num_directions", "zo_rule", "zo_eps"),
    "more": ("config", "help", "help_all"),
}

#: Options of TRL that would do nothing here, or what this command does itself.
NOT_TAKEN = {
    "model_init_kwargs": "name the dtype and the format of the weights with --dtype and --load_in_8bit",
    "trust_remote_code": "train a model that brings its own code in a script, with zo_hf.trl.ZOSFTTrainer",
    "dataset_kwargs": "give rows of text; tokens are for a script, with zo_hf.trl.ZOSFTTrainer",
}


@dataclass
class SftArguments(ModelArguments):
    """The model and the rows of the job.

    Raises:
        ValueError: an option has a wrong value, or does not go with another.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "a causal language model: hub name or folder (the embedded SmolLM2-135M-Instruct)"},
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "a .jsonl, .json, .csv or .tsv file with `messages`, `prompt` and `completion`, or `text` in every row "
            "(embedded conversions between units)"
        },
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "a file of held-out rows; by default, they are a part of --train_file"}
    )
    eval_fraction: float = field(
        default=0.1,
        metadata={
            "help": "the fraction of --train_file that is held out if there is no --eval_file; 0 holds none out"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"--eval_fraction {self.eval_fraction:g} is not between 0 and 1; 0.1 holds out a tenth.")
        if self.eval_file and not self.train_file:
            raise ValueError("--eval_file needs --train_file; give both.")


def sft_classes() -> tuple[Any, Any]:
    """Return TRL's SFTTrainer and SFTConfig, made forward-only.

    Raises:
        ImportError: TRL is not installed.
    """
    if find_spec("trl") is None:
        raise ImportError(
            "zo-hf sft trains with TRL, which is not installed; run `pip install 'zo_hf[trl]'` with Python 3.11 or newer."
        )
    from zo_hf.trl import ZOSFTConfig, ZOSFTTrainer

    return ZOSFTTrainer, ZOSFTConfig


def parse_sft_arguments(argv: list[str] | None, prog: str | None, description: str | None) -> tuple[SftArguments, Any]:
    """Parse a command line into the options of the job and of the trainer, with `RECIPE` as defaults.

    The arguments are those of `parse_options`.

    Raises:
        ImportError: TRL is not installed.
        ValueError: the file cannot be read or names an unknown option, or an option has a wrong value.
    """
    job, arguments = parse_options((SftArguments, sft_classes()[1]), RECIPE, NEEDED, argv, prog, description)
    for name, instead in NOT_TAKEN.items():
        if getattr(arguments, name):
            raise ValueError(f"zo-hf sft does not take --{name}; {instead}.")
    is_usual = (
        arguments.zo_subspace in ("auto", "low_rank") and arguments.zo_estimator == "two_point" and not job.use_peft
    )
    if arguments.learning_rate is None and is_usual:
        arguments.learning_rate = LOW_RANK_RATE
    if not job.eval_fraction and not job.eval_file:
        arguments.eval_strategy = IntervalStrategy.NO
    return job, arguments
