"""The console script `zo-hf`, with one subcommand per job.

The module of a command is imported only if that command is called. So `zo-hf --help` is immediate, and a command needs
only its own dependencies. Such a module declares options. It imports its work where it begins, unless its options are made
from that: those of `train`, `sft` and `find-lr` are transformers' TrainingArguments, and others name registered methods.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command, is_of_a_disk


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        summary: its line in `zo-hf --help`.
        start: runs it, given its command line and the program's name for its help.
    """

    summary: str
    start: Callable[[list[str], str], None]


def has_main(module: str) -> Callable[[list[str], str], None]:
    """Return the start of a command whose module parses its own command line in `main(argv, prog)`."""

    def start(argv: list[str], prog: str) -> None:
        import_module(module).main(argv, prog)

    return start


def has_arguments(module: str) -> Callable[[list[str], str], None]:
    """Return the start of a command whose module has `add_arguments(parser)` and `run(args)`.

    The module's docstring is the text at the top of its help. A ValueError of `run`, or an OSError of a
    file that it reads, becomes an error of the parser.
    """

    def start(argv: list[str], prog: str) -> None:
        job = import_module(module)
        parser = CommandParser(prog, description=job.__doc__)
        job.add_arguments(parser)
        args = parser.parse_args(argv)
        try:
            job.run(args)
        except ValueError as error:
            parser.error(str(error))
        except OSError as error:
            if is_of_a_disk(error):
                raise
            parser.error(str(error).partition("\n")[0])  # a model or a file that the options name cannot be read

    return start


COMMANDS = {
    "train": Command("fine-tune a language model to label sentences", has_main("zo_hf.tasks.sentiment_job")),
    "sft": Command("fine-tune a language model on chats and instructions", has_main("zo_hf.tasks.sft_job")),
    "predict": Command("label sentences with a model trained by `zo-hf train`", has_arguments("zo_hf.cli.predict")),
    "chat": Command("talk with a model trained by `zo-hf sft`", has_arguments("zo_hf.cli.chat")),
    "replay": Command(
        "turn a base model and a run's log into the fine-tuned model", has_arguments("zo_hf.cli.replay")
    ),
    "plan": Command("print the peak memory of every training setup of a model", has_arguments("zo_hf.cli.plan")),
    "find-lr": Command("find a learning rate for `zo-hf train` before training", has_main("zo_hf.cli.find_lr")),
    "methods": Command("list all methods with their papers and costs", has_arguments("zo_hf.cli.methods")),
    "evaluate-methods": Command(
        "compare methods fairly over a suite of tasks", has_main("zo_hf.cli.evaluate_methods")
    ),
    "bench": Command("compare speed and memory of a step with inference", has_arguments("zo_hf.cli.bench")),
}


def help_text() -> str:
    """Return the text that `zo-hf --help` prints."""
    lines = [
        "usage: zo-hf COMMAND [options]",
        "",
        "Fine-tune language models with forward passes only.",
        "",
        "commands:",
    ]
    lines += [f"  {name:<18}{command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "`zo-hf COMMAND --help` describes a command and its options.", "", "start here:"]
    lines += ["  zo-hf train --offline", '  zo-hf predict out "a deep and moving film ."', "  zo-hf sft --offline"]
    lines += ["  zo-hf plan facebook/opt-1.3b --gpu-memory 8GB"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run `zo-hf`; `argv` is the command line without the program's name."""
    with command():
        _run(sys.argv[1:] if argv is None else argv)


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return
    name, *rest = argv
    if name not in COMMANDS:
        print(f"zo-hf: {name!r} is not a command; use one of {', '.join(COMMANDS)}.", file=sys.stderr)
        raise SystemExit(2)
    COMMANDS[name].start(rest, f"zo-hf {name}")


if __name__ == "__main__":
    main()
