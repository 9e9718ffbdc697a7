"""A sample of each attack suite; `python -m tests.attacks` runs them whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attacks.suite import SUITES, Case, cases_of, sample, sample_size, verdict


def _sampled() -> list[object]:
    return [
        pytest.param(case, id=f"{suite}-{case.name}")
        for suite in SUITES
        for case in sample(cases_of(suite), sample_size(suite))
    ]


@pytest.mark.parametrize("case", _sampled())
def test_is_answered_rightly(case: Case, tmp_path: Path) -> None:
    assert verdict(case, tmp_path) is None
