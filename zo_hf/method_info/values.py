"""The values that an option takes: a type and a range, declared once and checked in one place."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

#: The largest whole number that torch and the readers of checkpoints and logs can hold.
MOST = 2**63 - 1

#: Number of characters that an error shows of a value.
_SHOWN = 80

#: Number of names up to which an error lists all of them.
_LISTED = 16


class Unfit(Exception):
    """Raised by `Values.clean`; its text completes the sentence that the value must be something."""


@dataclass(frozen=True)
class Values:
    """The values that an option takes.

    Args:
        also: further values that it takes as they are, such as None or "auto".
    """

    also: tuple[Any, ...] = field(default=(), kw_only=True)

    def clean(self, value: Any) -> Any:
        """Return the value as a plain number, string, bool or list of strings.

        Raises:
            Unfit: the option does not take it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Whole(Values):
    """Whole numbers of any integer type, numpy's too, except bool.

    Args:
        low, high: the smallest and the largest.
    """

    low: int = 0
    high: int = MOST

    def clean(self, value: Any) -> int:
        """Return the value as an int."""
        if self.high == MOST:
            text = f"a whole number of at least {self.low}"
        else:
            text = f"a whole number from {self.low} to {self.high}"
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise Unfit(text)
        number = operator.index(value)
        if number > MOST:
            raise Unfit(f"{text}, in 64 bits")
        if not self.low <= number <= self.high:
            raise Unfit(text)
        return number


@dataclass(frozen=True)
class Real(Values):
    """Finite numbers of any real type, numpy's too, except bool.

    Args:
        low, high: the ends of the range; infinity leaves it open.
        above: True if `low` itself is out of the range.
        below: True if `high` itself is out of the range.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def clean(self, value: Any) -> float:
        """Return the value as a float."""
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise Unfit(self._text())
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise Unfit(self._text())
        over_low = number > self.low if self.above else number >= self.low
        under_high = number < self.high if self.below else number <= self.high
        if not (over_low and under_high):
            raise Unfit(self._text())
        return number

    def _text(self) -> str:
        ends = []
        if self.low != -math.inf:
            ends.append(f"{'above' if self.above else 'of at least'} {self.low:g}")
        if self.high != math.inf:
            ends.append(f"{'below' if self.below else 'at most'} {self.high:g}")
        return " ".join(["a finite number", " and ".join(ends)]).rstrip()


@dataclass(frozen=True)
class Flag(Values):
    """True or False."""

    def clean(self, value: Any) -> bool:
        """Return the value as a bool; numpy's is taken, and 0 and 1 are not."""
        if isinstance(value, bool | np.bool_):
            return bool(value)
        raise Unfit("True or False")


@dataclass(frozen=True)
class Choice(Values):
    """One of several strings.

    Args:
        names: the strings.
    """

    names: tuple[str, ...] = ()

    def clean(self, value: Any) -> str:
        """Return the value as it is."""
        if isinstance(value, str) and value in self.names:
            return value
        known = [str(name) for name in (*self.also, *self.names)]
        if len(known) > _LISTED:
            alike = difflib.get_close_matches(str(value), known, 3) or known[:3]
            raise Unfit(f"one of {len(known)} names, such as {', '.join(alike)}")
        raise Unfit(f"one of {', '.join(known)}")


@dataclass(frozen=True)
class Name(Values):
    """A string, such as a name that a registry resolves, or a path."""

    def clean(self, value: Any) -> str:
        """Return the value as it is."""
        if isinstance(value, str):
            return value
        raise Unfit("a string")


@dataclass(frozen=True)
class Texts(Values):
    """A sequence of strings."""

    def clean(self, value: Any) -> list[str]:
        """Return the strings as a list."""
        if isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
            return list(value)
        raise Unfit("a list of strings")


@dataclass(frozen=True)
class OneOrMore(Values):
    """A string, or a sequence of strings."""

    def clean(self, value: Any) -> str | list[str]:
        """Return the string as it is, or the strings as a list."""
        if isinstance(value, str):
            return value
        if isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
            return list(value)
        raise Unfit("a string or a list of strings")


@dataclass(frozen=True)
class Pattern(Values):
    """A regular expression, or a sequence of name endings."""

    def clean(self, value: Any) -> str | list[str]:
        """Return the expression as it is, or the endings as a list."""
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise Unfit(f"a regular expression, and this one has an error ({error})") from None
            return value
        if isinstance(value, Sequence) and all(isinstance(end, str) for end in value):
            return list(value)
        raise Unfit("a regular expression or a list of name endings")


def checked(name: str, value: Any, values: Values, instead: str) -> Any:
    """Return an option's value in the form in which it is kept.

    Args:
        name: the option's name, for the message.
        value: the value that a user gave.
        values: the values that the option takes.
        instead: the way out, for the message.

    Raises:
        ValueError: the option does not take the value; the message names both.
    """
    if any(value is other or (type(value) is type(other) and value == other) for other in values.also):
        return value
    try:
        return values.clean(value)
    except Unfit as unfit:
        raise ValueError(f"{name}={shown(value)} must be {unfit}; {instead}.") from None


def plain(value: Any) -> Any:
    """Return the value of a member of an enumeration, as other libraries have for options; any other value as it is."""
    return value.value if isinstance(value, Enum) else value


def shown(value: Any) -> str:
    """Return a value as an error shows it: on one line, and cut if it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**_SHOWN:
        return "a number of more than 80 digits"  # Python refuses to write thousands of digits
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} and so on"
