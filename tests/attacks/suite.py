"""Attack suites: tables of bad input and bad moments, each case answered rightly or not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: One module of this package a suite. Its `cases()` returns the whole table, in the same order every time, and `SAMPLE`
#: is the number of cases that the default tests take.
SUITES = tuple(
    sorted(
        path.stem
        for path in Path(__file__).parent.glob("[a-z]*.py")
        if path.stem != "suite" and "test_" not in path.stem
    )
)


@dataclass(frozen=True)
class Case:
    """One attack.

    Args:
        name: a short name, unique in its suite.
        run: makes the attack in an empty folder, and returns None if the answer was right, otherwise one line that says
            what was wrong. An exception that reaches the caller is a wrong answer too.
    """

    name: str
    run: Callable[[Path], str | None]


def cases_of(suite: str) -> list[Case]:
    """Return all cases of a suite."""
    cases: list[Case] = importlib.import_module(f"tests.attacks.{suite}").cases()
    return cases


def sample_size(suite: str) -> int:
    """Return the number of a suite's cases that the default tests take."""
    size: int = importlib.import_module(f"tests.attacks.{suite}").SAMPLE
    return size


def sample(cases: list[Case], count: int) -> list[Case]:
    """Return at most `count` cases, spread evenly over the table."""
    if len(cases) <= count:
        return cases
    return [cases[index * len(cases) // count] for index in range(count)]


def verdict(case: Case, folder: Path) -> str | None:
    """Run a case; return what was wrong, or None."""
    try:
        return case.run(folder)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
