"""The search for a learning rate, on losses with a known best rate."""

from __future__ import annotations

import math

import pytest

from zo_hf.comparison.tuning import best_rate, first_rates, is_at_edge, is_complete, next_rate


def test_the_search_follows_the_best_rate_and_then_closes_in() -> None:
    def search(best: float, trials: int) -> dict[float, float]:
        losses: dict[float, float] = {}
        for rate in first_rates(1e-4, 4.0, trials):
            losses[rate] = abs(math.log(rate / best))
        while len(losses) < trials:
            rate = next_rate(losses, 4.0)
            losses[rate] = abs(math.log(rate / best))
        return losses

    assert sorted(search(1e-4, 5)) == pytest.approx([2.5e-5, 5e-5, 5e-5 * math.sqrt(2), 1e-4, 4e-4])
    far = search(6.4e-3, 5)
    assert max(far) == pytest.approx(6.4e-3) and min(far, key=far.__getitem__) == max(far)
    near = search(2e-4, 4)
    assert near[min(near, key=near.__getitem__)] == pytest.approx(0, abs=1e-6)
    assert next_rate({0.25: math.nan, 1.0: 0.5, 4.0: 0.6}, 4.0) == 2.0, "what is lost is the worst"


def test_a_best_rate_at_an_end_asks_for_up_to_as_many_trials_more() -> None:
    inside, outside = {1.0: 3.0, 2.0: 1.0, 4.0: 2.0}, {1.0: 3.0, 2.0: 2.0, 4.0: 1.0}
    assert not is_at_edge(inside) and is_at_edge(outside) and not is_at_edge({1.0: 3.0})
    assert is_complete(inside, 3) and not is_complete(outside, 3)
    assert is_complete(outside | {8.0: 0.5, 16.0: 0.4, 32.0: 0.3}, 3), "twice as many are the most"
    assert is_complete({1.0: 3.0, 2.0: 2.0}, 2), "of two rates, one is always at an end"
    assert best_rate({4.0: 1.0, 2.0: 1.0, 1.0: math.nan}) == 2.0, "the smaller one of two that are as good"
