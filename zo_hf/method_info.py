"""Information that every method gives about itself: its row in `zo-hf methods`, and its options with their help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """Facts that let a user compare one entry of a registry with the others.

    Args:
        paper: source of the method, with its arXiv number if it has one.
        forwards: forward passes of a step, in terms of q (`zo_num_directions`); "" if the method does not change them.
        memory: numbers held beyond the weights, in terms of d (number of coordinates); "0" if it holds none.
        needs: requirements on the model and the options; "" if it has none.
    """

    paper: str
    forwards: str = ""
    memory: str = "0"
    needs: str = ""


def option(default: Any, help: str) -> Any:
    """A dataclass field that is an option of a method.

    Args:
        default: its value if the user gives none.
        help: the text of `--help` and of docs/options.md.
    """
    return field(default=default, metadata={"help": help})


def canonical_name(option_name: str, name: str, entries: Mapping[str, Any]) -> str:
    """The name of a registry's entry that `name` is, or is an alias of.

    Args:
        option_name: the option that has the value `name`, for the message.
        entries: the registry.

    Raises:
        ValueError: no entry is called that; the message lists the names.
    """
    for entry in entries.values():
        if name == entry.name or name in entry.aliases:
            return str(entry.name)
    raise ValueError(f"{option_name}={name!r} is unknown; choose one of {', '.join(entries)}.")
