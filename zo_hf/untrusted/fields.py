"""Tests of values that were read from a file, and a table of them for an object."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

#: Returns whether a value may stand in a field.
Fits = Callable[[Any], bool]

MAX_TEXT = 4096


def is_flag(value: Any) -> bool:
    """Return whether a value is True or False."""
    return isinstance(value, bool)


def is_text(value: Any) -> bool:
    """Return whether a value is a text of at most `MAX_TEXT` characters that can be written as UTF-8."""
    return isinstance(value, str) and len(value) <= MAX_TEXT and not any("\ud800" <= c <= "\udfff" for c in value)


def is_object(value: Any) -> bool:
    """Return whether a value is an object of JSON."""
    return isinstance(value, dict)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(least: int = 0, most: int = (1 << 63) - 1) -> Fits:
    """Return a test for whole numbers from `least` to `most`."""
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def number(least: float, most: float) -> Fits:
    """Return a test for numbers from `least` to `most`."""
    return lambda value: is_number(value) and least <= value <= most


def one_of(*values: Any) -> Fits:
    """Return a test for the given texts, numbers and flags; True is not 1."""
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def maybe(fits: Fits) -> Fits:
    """Return a test for None, and what `fits` accepts."""
    return lambda value: value is None or fits(value)


def either(*tests: Fits) -> Fits:
    """Return a test for what one of the tests accepts."""
    return lambda value: any(fits(value) for fits in tests)


def list_of(fits: Fits, least: int = 0, most: int = 1 << 20) -> Fits:
    """Return a test for lists of `least` to `most` items that `fits` accepts."""
    return lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(fits, value))


def distinct(fits: Fits) -> Fits:
    """Return a test for lists of different texts that `fits` accepts."""
    return lambda value: list_of(fits)(value) and len(set(value)) == len(value)


def object_of(fits: Fits) -> Fits:
    """Return a test for objects whose names are texts and whose values `fits` accepts."""
    return lambda value: isinstance(value, dict) and all(is_text(name) and fits(v) for name, v in value.items())


def first_misfit(record: Mapping[str, Any], table: Mapping[str, Fits]) -> str | None:
    """Return the name of a field whose value its test rejects, None standing for a missing one; None if all fit."""
    return next((name for name, fits in table.items() if not fits(record.get(name))), None)


def fits_type(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type: a union of None, bool, int, float and str; a whole number is a float, too.

    Args:
        value: a value of JSON.
        kind: the type, as `typing.get_type_hints` gives it.
    """
    if get_origin(kind) in (Union, UnionType):
        return any(fits_type(value, one) for one in get_args(kind))
    if kind is float:
        return is_number(value)
    if kind is int:
        return whole(-(1 << 63))(value)
    if kind is str:
        return is_text(value)
    return kind in (bool, NoneType) and isinstance(value, kind)


def shown(value: Any) -> str:
    """Return a short form of a value for a message, printable and on one line; a text stands there without quotes."""
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 200 else brief(value)


def brief(value: Any) -> str:
    """Return the `repr` of a value for a message, shortened, printable and on one line."""
    text = _BRIEF.repr(value)
    return text if text.isprintable() else ascii(text)


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = 200
