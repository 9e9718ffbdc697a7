"""Every check on every combination of the registries' entries, without a Trainer."""

from __future__ import annotations

import itertools

import pytest

from tests.methods.checks import CHECKS
from tests.methods.table import REGISTRIES, Combination, combinations, refusal

EVERY = combinations()
ENTRIES = [(registry, name) for registry, entries in REGISTRIES.items() for name in entries]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("combination", EVERY, ids=str)
def test_every_method(combination: Combination, check: str) -> None:
    CHECKS[check](combination)


@pytest.mark.parametrize("entry", ENTRIES, ids="-".join)
def test_no_entry_is_left_out(entry: tuple[str, str]) -> None:
    assert any(entry in combination.entries for combination in EVERY), "it is refused with everything"


def refused() -> list[Combination]:
    """All that contain two entries which are in no combination of the table together."""
    covered = {pair for combination in EVERY for pair in combination.pairs}
    return [
        c for c in itertools.starmap(Combination, itertools.product(*REGISTRIES.values())) if not c.pairs <= covered
    ]


def test_every_two_entries_that_work_together_are_covered() -> None:
    assert all(refusal(combination) is not None for combination in refused())


def test_a_refusal_is_one_sentence_that_names_what_it_is_about() -> None:
    for said in {str(refusal(combination)) for combination in refused()}:
        assert said.endswith(".") and "\n" not in said and "=" in said, said
