"""Options of a job: from its command line, and from a YAML file of defaults."""

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.job_help import ReadableHelp, add_help


class _JobParser(CommandParser, HfArgumentParser):
    """Makes an option of every field of the given dataclasses."""


def parse_options(
    kinds: tuple[type, type],
    recipe: Mapping[str, Any],
    needed: Mapping[str, Sequence[str]],
    argv: list[str] | None,
    prog: str | None,
    description: str | None,
    config: Path | None = None,
) -> tuple[Any, Any]:
    """Parse a command line into the options of a job and of its trainer.

    Args:
        kinds: the dataclass of the job's options, and that of the trainer's, a `ZOConfig`.
        recipe: the job's defaults for options of the trainer.
        needed: the options of `--help`, by group.
        argv: the command line without the program's name; None means `sys.argv[1:]`.
        prog: the program's name in the help.
        description: the text at the top of the help.
        config: a YAML file with other defaults, used unless the command line names one with --config.

    Raises:
        ValueError: the file cannot be read or names an unknown option, or an option has a wrong value.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _JobParser(
        kinds,
        prog=prog,
        usage="%(prog)s [options]",
        description=description,
        formatter_class=ReadableHelp,
        add_help=False,
    )
    add_help(parser, needed)
    parser.add_argument(
        "--config",
        type=Path,
        help="a YAML file of these options; options on the command line override it",
        default=config,
    )
    parser.set_defaults(**recipe)
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    values = vars(parser.parse_args(argv))
    file = values["config"]
    if file is not None:
        options = read_options(file, {part.name for kind in kinds for part in fields(kind) if part.init})
        parser.set_defaults(**options)
        given |= options.keys() if file != config else set()
        values = vars(parser.parse_args(argv))
    if values["zo_max_forward_passes"] is not None and "max_steps" not in given:
        values["max_steps"] = -1  # the number of steps follows from the forward passes
    if values["zo_estimator"] != "two_point" and "learning_rate" not in given:
        values["learning_rate"] = None  # the default rate is for two-point estimates along random directions
    if values["zo_subspace"] == "norms" and values["zo_exclude_modules"] == recipe["zo_exclude_modules"]:
        values["zo_exclude_modules"] = None
    job, arguments = parser.parse_dict(values, allow_extra_keys=True)
    folder = Path(arguments.output_dir)
    there = next((part for part in (folder, *folder.parents) if part.exists()), None)
    if there is not None and not there.is_dir():
        raise ValueError(f"--output_dir {folder} is not a folder, because {there} is a file; name another one.")
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
