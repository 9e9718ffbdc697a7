"""An option of a method: a field with default, help and values."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from zo_hf.method_info.values import Values, checked


def option(default: Any, help: str, values: Values | None = None, instead: str = "") -> Any:
    """A dataclass field that is an option of a method.

    Args:
        default: its value if the user gives none.
        help: the text of `--help` and of docs/options.md.
        values: the values that it takes; None leaves the check to the class that has the field.
        instead: the end of the sentence that refuses another value: the way out.
    """
    metadata: dict[str, Any] = {"help": help}
    if values is not None:
        metadata |= {"values": values, "instead": instead}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """Base class of records of options. It checks every value, and keeps numbers and flags as Python's own.

    Raises:
        ValueError: an option does not take its value; the message names the option, with `zo_` in front.
    """

    def __post_init__(self) -> None:
        for part in fields(self):
            name = part.name if part.name == "seed" else f"zo_{part.name}"
            values, instead = part.metadata["values"], part.metadata["instead"]
            object.__setattr__(self, part.name, checked(name, getattr(self, part.name), values, instead))
