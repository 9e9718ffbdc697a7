"""The search for a learning rate, on losses with a known best rate."""

from __future__ import annotations

import math

import pytest

from zo_hf.comparison.tuning import first_rates, next_rate


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
