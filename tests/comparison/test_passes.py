"""Forward passes to another method's end, on constructed curves."""

from __future__ import annotations

import math

import pytest

from zo_hf.comparison.passes import passes_table, passes_to_end_of, smoothed_mean
from zo_hf.comparison.result import Result

START = {"loss": 5.0}


def result(losses: list[list[float]], passes: list[int]) -> Result:
    runs = [
        {"scores": [{"loss": l, "forward_passes": p} for l, p in zip(seed, passes, strict=True)]} for seed in losses
    ]
    return Result("g", {1.0: 0.5}, runs)


SLOW = result([[4.5, 4.5, 2.0, 2.0], [3.5, 3.5, 2.0, 2.0]], [10, 20, 30, 40])
QUICK = result([[3.0, 1.0, 1.0, 1.0], [3.0, 1.0, 1.0, 1.0]], [9, 18, 27, 36])


def test_passes_are_read_where_the_smoothed_mean_crosses() -> None:
    assert smoothed_mean(SLOW.over_seeds("loss")).tolist() == pytest.approx([4, 10 / 3, 8 / 3, 2])
    # Smoothed 5, 2, 5/3, ...: at 2 after 9 passes.
    assert passes_to_end_of(SLOW, QUICK, START, "loss") == pytest.approx(9)
    # Smoothed 3, 2, 1, 0.
    assert passes_to_end_of(SLOW, result([[3.0, 3.0, 0.0, 0.0]], [10, 20, 30, 40]), START, "loss") == pytest.approx(20)
    # From 5 at the start to 1 after 10 passes, it is at 2 after three quarters of them.
    assert passes_to_end_of(SLOW, result([[1.0, 1.0]], [10, 20]), START, "loss") == pytest.approx(7.5)
    assert passes_to_end_of(SLOW, SLOW, START, "loss") == 40


def test_an_end_that_is_never_reached_has_no_passes() -> None:
    assert passes_to_end_of(SLOW, result([[3.0] * 4], [10, 20, 30, 40]), START, "loss") is None
    assert passes_to_end_of(SLOW, QUICK, {"loss": 1.5}, "loss") is None, "the target learned nothing"
    assert passes_to_end_of(result([[math.nan] * 4], [10, 20, 30, 40]), QUICK, START, "loss") is None


def test_a_run_that_comes_back_from_an_infinite_loss_is_read_at_its_first_finite_score() -> None:
    back = result([[math.inf, math.inf, 1.0, 1.0, 1.0]], [10, 20, 30, 40, 50])
    assert passes_to_end_of(SLOW, back, START, "loss") == 40, "its neighbors are finite, too"


def test_more_accuracy_is_better() -> None:
    runs = [{"scores": [{"accuracy": a, "forward_passes": p} for a, p in ((0.5, 10), (0.7, 20), (0.7, 30))]}]
    found = Result("g", {1.0: 0.5}, runs)
    # Smoothed 0.6, 0.633, 0.7.
    assert passes_to_end_of(found, found, {"accuracy": 0.5}, "accuracy") == 30


def test_the_table_has_a_row_for_every_method_and_a_column_for_every_target() -> None:
    text = passes_table({"slow": SLOW, "quick": QUICK}, START, ["slow", "quick", "slow", "unfinished"])
    assert text.splitlines() == [
        "| forward passes to the final loss of | slow | quick |",
        "|---|---:|---:|",
        "| this loss | 2.000 | 1.000 |",
        "| slow | 40 | - |",
        "| quick | 9 | 27 |",
    ]


def test_there_is_no_table_without_a_target() -> None:
    assert passes_table({"quick": QUICK}, START, ["unfinished"]) == ""
