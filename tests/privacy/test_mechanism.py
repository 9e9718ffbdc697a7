"""The mechanism against its theorem: what one row can change, and how much noise hides it."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from zo_hf.privacy import GaussianMechanism, Secret
from zo_hf.privacy.mechanism import GRID

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
BOUNDS = st.floats(1e-6, 1e6)


def length(numbers: list[int]) -> float:
    return math.sqrt(sum((c / GRID) ** 2 for c in numbers))


@given(st.lists(NUMBERS, min_size=1, max_size=5), BOUNDS)
def test_no_row_is_longer_than_the_bound(numbers: list[float], max_c: float) -> None:
    found = GaussianMechanism(1.0, max_c).bounded(numbers)
    assert sum(c * c for c in found) <= GRID * GRID  # in integers, so without a tolerance
    if not all(map(math.isfinite, numbers)):
        assert not any(found)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), BOUNDS)
def test_a_row_keeps_its_direction_and_is_shortened_to_the_bound(numbers: list[float], max_c: float) -> None:
    found = GaussianMechanism(1.0, max_c).bounded(numbers)
    norm = math.hypot(*numbers)
    factor = min(1.0, max_c / norm) / max_c if norm else 0.0
    assert np.allclose([c / GRID for c in found], [c * factor for c in numbers], rtol=1e-9, atol=4 / GRID)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.lists(NUMBERS, min_size=2, max_size=2)), min_size=1, max_size=12),
    BOUNDS,
    st.data(),
)
def test_a_row_changes_the_sums_by_at_most_the_bound(rows: list, max_c: float, data: st.DataObject) -> None:
    """Added or removed, in whichever group it is: the sums are one vector for four groups of two directions."""
    mechanism = GaussianMechanism(1.0, max_c)

    def sums(of: list) -> list[int]:
        total = [0] * 8
        for group, numbers in of:
            for place, c in enumerate(mechanism.bounded(numbers)):
                total[2 * group + place] += c
        return total

    left_out = data.draw(st.integers(0, len(rows) - 1))
    pairs = zip(sums(rows), sums(rows[:left_out] + rows[left_out + 1 :]), strict=True)
    assert sum((a - b) ** 2 for a, b in pairs) <= GRID * GRID


def test_the_noise_is_normal_and_has_the_standard_deviation_that_the_account_assumes() -> None:
    mechanism, secret = GaussianMechanism(3.0, 7.0), Secret(bytes(32))
    drawn = np.array(mechanism.noise(secret, 0, 20_000)) / GRID
    assert stats.kstest(drawn / 3.0, "norm").pvalue > 1e-3
    assert abs(drawn.std() / 3.0 - 1) < 0.02
    # In the units of c, per row of a step of 5: σ · C / B.
    assert np.allclose(mechanism.mean([GRID], 5), 7.0 / 5)


def test_noise_is_new_in_every_step_and_place_and_repeats_with_the_secret() -> None:
    mechanism, secret = GaussianMechanism(1.0, 1.0), Secret()
    steps = [mechanism.noise(secret, step, 3) for step in range(4)]
    assert len({number for step in steps for number in step}) == 12
    assert [mechanism.noise(Secret(secret.key), step, 3) for step in range(4)] == steps
    assert mechanism.noise(Secret(), 0, 3) != steps[0]
    assert mechanism.noise(secret, 0, 5)[:3] == steps[0]


def test_without_noise_none_is_drawn() -> None:
    assert GaussianMechanism(0.0, 1.0).noise(Secret(), 0, 4) == [0, 0, 0, 0]


def test_a_secret_does_not_show_itself() -> None:
    secret = Secret()
    assert secret.key.hex() not in repr(secret) and str(secret.key) not in repr(secret)
    with pytest.raises(ValueError, match="31 bytes and needs 32; use the file of a checkpoint"):
        Secret(bytes(31))


def test_rows_draw_their_group_alike_and_apart_from_other_rows() -> None:
    """A row's group depends on no other row: more rows behind it change nothing."""
    secret = Secret(bytes(32))
    drawn = secret.groups(5, 40_000, 4)
    assert secret.groups(5, 100, 4) == drawn[:100]
    assert stats.chisquare(list(Counter(drawn).values())).pvalue > 1e-3
