"""The options of the fine-tuning job, and its defaults for the options of the trainer."""

from dataclasses import dataclass, field
from pathlib import Path

from zo_hf.tasks.job_help import NEEDED
from zo_hf.tasks.job_options import parse_options
from zo_hf.tasks.model_arguments import ModelArguments
from zo_hf.tasks.prompts import PROMPT_A
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
    # Neither a direction for every row nor one for a pair of rows was clearly better: docs/guides/rows.md.
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
class JobArguments(ModelArguments):
    """The model, the sentences and the prompt of the job."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": f"a causal language model: hub name or folder ({HUB_MODEL}; without a hub, SmolLM2-135M)"},
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
            "help": "cross entropy between the label words only, or over the whole vocabulary",
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
        super().__post_init__()
        if self.train_file and self.dataset_name:
            raise ValueError("--train_file and --dataset_name name two sources of sentences; give one of them.")
        if self.validation_file and not self.train_file:
            raise ValueError("--validation_file needs --train_file; give both.")


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
    job, arguments = parse_options((JobArguments, ZOConfig), RECIPE, NEEDED, argv, prog, description, config)
    return job, arguments
