"""The watch over a run's losses: which rises it tells of, and which it leaves alone."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from zo_hf.lr_finder.loss_watch import WINDOW, LossWatch


def told(watch: LossWatch, losses: list[float]) -> list[int]:
    """The indices of the losses at which the watch tells of a rise."""
    return [index for index, loss in enumerate(losses) if watch.rises(loss) is not None]


def noisy(levels: list[float], deviation: float, seed: int = 0) -> list[float]:
    return (np.array(levels) + deviation * np.random.default_rng(seed).normal(size=len(levels))).tolist()


@pytest.mark.parametrize("deviation", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("known", [True, False])
def test_a_loss_that_falls_or_stays_is_left_alone(deviation: float, known: bool) -> None:
    for seed in range(20):
        falling = noisy(np.linspace(4.0, 1.0, 500).tolist() + [1.0] * 500, deviation, seed)
        watch = LossWatch(4.0, deviation) if known else LossWatch()
        assert not told(watch, falling)


def test_a_loss_that_explodes_is_told_of_after_one_step() -> None:
    losses = [*noisy([4.0] * 40, 0.1), 9.0, 20.0, 80.0]
    assert told(LossWatch(4.0, 0.1), losses) == [40, 41, 42]


def test_a_slow_rise_is_told_of_before_it_reaches_half() -> None:
    losses = noisy(np.linspace(4.0, 6.0, 200).tolist(), 0.1)
    first = told(LossWatch(4.0, 0.1), losses)[0]
    assert losses[first] < 5.0


def test_a_rise_over_what_was_gained_is_told_of_below_the_first_loss() -> None:
    losses = noisy([4.0] * 10 + [2.0] * 30 + [3.2] * 20, 0.1)
    (index,) = told(LossWatch(4.0, 0.1), losses)
    assert 40 <= index < 40 + WINDOW


def test_after_a_rise_a_loss_that_falls_again_is_left_alone() -> None:
    losses = noisy([4.0] * 10 + [9.0], 0.05) + noisy(np.linspace(9.0, 3.0, 60).tolist(), 0.05)
    assert told(LossWatch(4.0, 0.05), losses) == [10]


def test_a_loss_that_stays_above_the_first_is_told_of_again_and_again() -> None:
    losses = noisy([4.0] * 10 + [9.0] * 100, 0.05)
    assert told(LossWatch(4.0, 0.05), losses) == [10, 40, 70, 100]


def test_losses_that_are_not_finite_are_left_to_the_engine() -> None:
    assert not told(LossWatch(4.0), [math.nan, math.inf, 4.0, -math.inf])


def test_its_state_is_plain_numbers_and_continues() -> None:
    losses = noisy([4.0] * 10 + [2.0] * 30 + [3.2] * 20 + [9.0] * 20, 0.1)
    whole, half = LossWatch(4.0, 0.1), LossWatch(4.0, 0.1)
    expected = told(whole, losses)
    before = told(half, losses[:45])
    after = told(LossWatch.from_state(json.loads(json.dumps(half.state()))), losses[45:])
    assert before + [45 + index for index in after] == expected and len(expected) > 1
