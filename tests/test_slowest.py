"""The list of slow cases names tests that exist, and leaves every test a quick case."""

from __future__ import annotations

import ast
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.slowest import LIST, PATIENCE, slowest

ROOT = Path(__file__).parents[1]


def test_every_listed_case_belongs_to_a_test() -> None:
    """Cases of tests that have gone away or been renamed would be run by default again."""
    listed = LIST.read_text(encoding="utf-8").splitlines()
    assert listed == sorted(set(listed))
    for file in {case.split("::")[0] for case in listed}:
        defined = {n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)}
        assert {case.split("::")[1].split("[")[0] for case in listed if case.startswith(f"{file}::")} <= defined


@given(
    st.dictionaries(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), st.floats(0.01, 10), min_size=1),
    st.floats(0.1, 50),
)
def test_the_longest_go_and_the_rest_fits(times: dict[tuple[str, int], float], seconds: float) -> None:
    durations = {f"test_{name}[{number}]": taken for (name, number), taken in times.items()}
    left_out = slowest(durations, seconds)
    kept = {case: taken for case, taken in durations.items() if case not in left_out}
    shortest = min((durations[case] for case in left_out), default=0.0)
    for name in "abc":
        of_test = [case for case in durations if case.startswith(f"test_{name}")]
        quickest = min(of_test, key=lambda case: (durations[case], case), default=None)
        for case in kept.keys() & set(of_test):
            assert not left_out or durations[case] <= shortest * (PATIENCE if case == quickest else 1)
    if sum(kept.values()) > seconds:  # only quickest cases are left, each of which is short for its test
        assert all(sum(case.startswith(kept_case.split("[")[0]) for case in kept) == 1 for kept_case in kept)
