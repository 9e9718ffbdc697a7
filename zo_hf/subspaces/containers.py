"""Containers of tensors made anew with other values: dicts, lists and tuples, and people's own classes of these kinds."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def is_record(value: Any) -> bool:
    """Return whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def sequence_like(like: Sequence[Any], values: Iterable[Any]) -> Any:
    """Return a list, tuple or named tuple of the kind of another one."""
    return like._make(values) if hasattr(like, "_make") else type(like)(values)  # type: ignore[call-arg]


def with_values(container: Any, function: Callable[[Any], Any]) -> Any:
    """Return a container of the same kind with `function` of each of its values; anything else as it is.

    Args:
        container: a mapping, a list, a tuple or an instance of a dataclass.
        function: makes a new value of an old one.

    Raises:
        ValueError: it is a mapping whose class is not made of a dict.
    """
    if isinstance(container, tuple | list):
        return sequence_like(container, map(function, container))
    if isinstance(container, dict | UserDict):
        new = copy.copy(container)
        for name, value in container.items():
            new[name] = function(value)
        return new
    if isinstance(container, Mapping):
        values = {name: function(value) for name, value in container.items()}
        try:
            return type(container)(values)  # type: ignore[call-arg]
        except TypeError as error:
            raise ValueError(
                f"a {type(container).__name__} cannot be made anew of a dict of its values ({error}); use a dict in its place."
            ) from error
    if is_record(container):
        new = copy.copy(container)
        for field in dataclasses.fields(container):
            if hasattr(container, field.name):  # one with init=False may never have been set
                object.__setattr__(new, field.name, function(getattr(container, field.name)))
        return new
    return container
