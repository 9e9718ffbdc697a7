"""One row of the table of what does not combine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from zo_hf.case import Case


@dataclass(frozen=True)
class Conflict:
    """One row of the table; texts may hold `{option}`, which an error shows as the option's value.

    Args:
        this: an option with its value.
        that: the option, model or mode of training that it does not combine with.
        why: the reason; "" if the option would have no effect.
        instead: the way out.
        applies: returns whether a run has the conflict.
    """

    this: str
    that: str
    why: str
    instead: str
    applies: Callable[[Case], bool]

    def message(self, case: Case) -> str:
        """Return the sentence that refuses a run."""
        if self.why:
            sentence = f"{self.this} does not combine with {self.that}: {self.why}; {self.instead}."
        else:
            sentence = f"{self.this} has no effect with {self.that}; {self.instead}."
        return sentence.format_map(case.values)


def either(values: Iterable[object]) -> str:
    """Return values as a choice in words: "'a', 'b' or 'c'"."""
    *others, last = map(repr, values)
    return f"{', '.join(others)} or {last}" if others else last


def rows_of(this: str, holds: Callable[[Case], bool]) -> Callable[[str, str, str, Callable[[Case], bool]], Conflict]:
    """Return a function that makes the rows of one option from `that`, `why`, `instead` and `applies`.

    Args:
        this: the option with its value.
        holds: returns whether a run has this value; no other run has a conflict of these rows.
    """

    def row(that: str, why: str, instead: str, applies: Callable[[Case], bool]) -> Conflict:
        return Conflict(this, that, why, instead, lambda case: holds(case) and applies(case))

    return row


def with_argument(this: str, name: str, why: str, applies: Callable[[Case], bool]) -> Conflict:
    """Return the row of an argument of the Trainer that must be left out where `this` is set, or the other way round.

    Args:
        this: the other option with its value.
        name: the argument.
        why: the reason.
        applies: returns whether a run has `this`.
    """
    return Conflict(
        this,
        f"{name}={{{name}}}",
        why,
        "leave one of them out",
        lambda case: bool(case.argument(name)) and applies(case),
    )
