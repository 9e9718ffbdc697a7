"""Poisson sampling: every row by itself, with the probability that the account assumes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from zo_hf.privacy import Secret
from zo_hf.privacy.poisson import PoissonSampling

ROWS, EXPECTED, STEPS = 50, 10, 2000


def test_rows_are_drawn_independently_with_the_same_probability() -> None:
    sampling = PoissonSampling(Secret(bytes(32)), ROWS, EXPECTED, 1)
    drawn = np.zeros((STEPS, ROWS))
    for step in range(STEPS):
        drawn[step, sampling.rows_of(step)] = 1
    rate = EXPECTED / ROWS
    counts = drawn.sum(0)
    z = (counts - STEPS * rate) / np.sqrt(STEPS * rate * (1 - rate))
    assert stats.kstest(z, "norm").pvalue > 1e-3
    # The number of rows of a step is binomial, not fixed.
    assert abs(drawn.sum(1).var() / (ROWS * rate * (1 - rate)) - 1) < 0.15
    correlation = np.corrcoef(drawn.T)[np.triu_indices(ROWS, 1)]
    assert abs(correlation.mean()) < 0.005 and abs(correlation).max() < 0.12


@pytest.mark.parametrize("parts", [1, 3, 7, 40])
def test_parts_together_are_the_step(parts: int) -> None:
    sampling = PoissonSampling(Secret(bytes(32)), ROWS, EXPECTED, parts)
    for step in range(20):
        found = [sampling.part(step, number) for number in range(parts)]
        together = [row for _, rows in found for row in rows]
        assert together == sampling.rows_of(step).tolist() == sorted(set(together))
        sizes = [len(rows) for _, rows in found]
        assert max(sizes) - min(sizes) <= 1
        assert [first for first, _ in found] == [sum(sizes[:k]) for k in range(parts)]


def test_all_rows_are_in_every_step_if_so_many_are_expected() -> None:
    assert PoissonSampling(Secret(), 7, 7, 1).rows_of(3).tolist() == list(range(7))


def test_a_step_of_more_rows_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a private step of 8 rows needs .* it has 7; use a smaller"):
        PoissonSampling(Secret(), 7, 8, 1)
