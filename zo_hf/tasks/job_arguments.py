"""What the fine-tuning job is told: its options, and the recipe's defaults for the trainer's."""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field

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
    "zo_subspace": "low_rank",
    "zo_rank": 4,
    "zo_fold_steps": 50,
    "zo_eps": 1e-3,
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
        if self.train_file and self.dataset_name:
            raise ValueError("--train_file and --dataset_name name two sources of sentences: give one of them.")
        if self.validation_file and not self.train_file:
            raise ValueError("--validation_file holds out sentences of --train_file: give that too.")


class _ReadableHelp(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The description as it is written, and each option's default."""


def parse_arguments(
    argv: list[str] | None, prog: str | None, description: str | None
) -> tuple[JobArguments, ZOConfig]:
    """Parse a command line into the job's and the trainer's options; the recipe's values are the defaults."""
    parser = HfArgumentParser(
        [JobArguments, ZOConfig],
        prog=prog,
        usage="%(prog)s [options]",
        description=description,
        formatter_class=_ReadableHelp,
    )
    parser.set_defaults(**RECIPE)
    job, config = parser.parse_args_into_dataclasses(args=argv)
    return job, config
