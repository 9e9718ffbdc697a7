"""The checks on combinations of the registries' entries, without a Trainer."""

from __future__ import annotations

import itertools

import pytest

from tests.methods.checks import (
    CHECKS,
    has_plain_update,
    its_numbers_replay,
    the_update_is_along_what_was_probed,
)
from tests.methods.table import REGISTRIES, Combination, combinations, one_for_every_entry, refusal

ENTRIES = {(registry, name) for registry, entries in REGISTRIES.items() for name in entries}
REPLAY, UPDATE = its_numbers_replay.__name__, the_update_is_along_what_was_probed.__name__


def cases() -> list[tuple[Combination, str]]:
    """Combinations and the checks that they get: every entry gets every check, every two that work together at least one.

    The few combinations that hold every entry get all checks, each of the others gets one in turn.
    """
    every = combinations()
    whole = one_for_every_entry()
    found = list(itertools.product(whole, CHECKS))
    in_turn = itertools.cycle(check for check in CHECKS if check != UPDATE)
    found += [(combination, next(in_turn)) for combination in every if combination not in whole]
    found += [(combination, UPDATE) for combination in every if has_plain_update(combination)]
    return [case for case in dict.fromkeys(found) if case[1] != UPDATE or has_plain_update(case[0])]


@pytest.mark.parametrize(("combination", "check"), cases(), ids=str)
def test_every_method(combination: Combination, check: str) -> None:
    CHECKS[check](combination)


@pytest.mark.parametrize("check", CHECKS)
def test_no_check_leaves_an_entry_out(check: str) -> None:
    """Of those that work with anything: what is refused with everything is in no combination."""
    left_out = ENTRIES - {entry for combination, name in cases() if name == check for entry in combination.entries}
    if check == UPDATE:  # which only the plain rule makes plain, and not on factors that are exponentials
        assert left_out == {entry for entry in ENTRIES if entry[0] == "rule"} - {("rule", "none")} | {
            ("subspace", "scales")
        }
    else:
        assert not left_out


def test_every_two_entries_in_no_combination_together_are_refused_in_one_sentence() -> None:
    """It names what it is about."""
    covered = {pair for combination in combinations() for pair in combination.pairs}
    for combination in itertools.starmap(Combination, itertools.product(*REGISTRIES.values())):
        if not combination.pairs <= covered:
            said = refusal(combination)
            assert said is not None, f"{combination} works"
            assert said.endswith(".") and "\n" not in said and "=" in said, said
