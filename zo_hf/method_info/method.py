"""A method's row in `zo-hf methods`, and the names by which options select a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zo_hf.method_info.values import shown


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
    raise ValueError(f"{option_name}={shown(name)} is unknown; choose one of {', '.join(entries)}.")
