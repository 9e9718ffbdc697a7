"""The help of the job's command: `--help` shows the options that most runs need, `--help-all` all of them."""

from __future__ import annotations

from argparse import (
    SUPPRESS,
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Mapping, Sequence
from typing import Any

#: The options of `zo-hf train --help`, by group.
NEEDED = {
    "model": ("model_name_or_path", "dtype", "load_in_8bit", "load_in_4bit", "use_peft", "offline"),
    "sentences": ("dataset_name", "train_file", "template", "verbalizers"),
    "training": (
        "output_dir",
        "max_steps",
        "zo_max_forward_passes",
        "per_device_train_batch_size",
        "learning_rate",
        "lr_scheduler_type",
        "optim",
        "eval_steps",
        "seed",
        "resume_from_checkpoint",
    ),
    "method": (
        "zo_subspace",
        "zo_rank",
        "zo_fold_steps",
        "zo_estimator",
        "zo_num_directions",
        "zo_direction",
        "zo_rule",
        "zo_eps",
        "zo_exclude_modules",
    ),
    "more": ("config", "help", "help_all"),
}


class ReadableHelp(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """A formatter that keeps the description as it is written, and shows each option's default unless it is None."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: Action) -> str:
        """One spelling of an option: HfArgumentParser also accepts hyphens, which would double every line."""
        spellings = [word for word in action.option_strings if not word.startswith("--") or "-" not in word[2:]]
        if action.nargs == 0:
            return ", ".join(spellings or action.option_strings)
        return f"{(spellings or action.option_strings)[0]} {self._format_args(action, 'VALUE')}"


class ShowHelp(Action):
    """Prints a help and ends the program, as argparse's own action does."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, help: str, needed: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        super().__init__(option_strings, dest, nargs=0, default=SUPPRESS, help=help)
        self.needed = needed

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: Any = None) -> None:
        print(parser.format_help() if self.needed is None else short_help(parser, self.needed))
        parser.exit()


def add_help(parser: ArgumentParser, needed: Mapping[str, Sequence[str]]) -> None:
    """Add `--help`, with the options of `needed`, and `--help-all` to a parser that was made with `add_help=False`."""
    number = sum(map(len, needed.values()))
    parser.add_argument(
        "-h", "--help", action=ShowHelp, needed=needed, help=f"show the {number} options that most runs need"
    )
    parser.add_argument("--help-all", action=ShowHelp, help="show every option, Trainer's included")


def short_help(parser: ArgumentParser, needed: Mapping[str, Sequence[str]]) -> str:
    """The help with the options of `needed` alone, in their groups."""
    actions = {action.dest: action for action in parser._actions}
    shown = ArgumentParser(
        prog=parser.prog,
        usage=parser.usage,
        description=parser.description,
        formatter_class=parser.formatter_class,
        add_help=False,
        epilog="--help-all shows every other option; docs/options.md explains those of zo_hf.",
    )
    for title, names in needed.items():
        group = shown.add_argument_group(title)
        group._group_actions.extend(actions[name] for name in names)
    return shown.format_help()
