"""The order of runs: trials, then full runs, and what a failure leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zo_hf.comparison import schedule
from zo_hf.comparison.finished_runs import FinishedRuns
from zo_hf.comparison.job import SETTINGS, Job, Problem
from zo_hf.comparison.methods import Method
from zo_hf.comparison.processes import InThisProcess
from zo_hf.comparison.schedule import TRIAL_SEED, Comparison, Protocol, run_all

METHODS = {"good": Method("g", 1e-4, {"zo_rank": 2}), "broken": Method("g", 1e-4, {})}


def comparison(folder: Path, alignment: str = "prompt", seeds: tuple[int, ...] = (0, 1)) -> Comparison:
    protocol = Protocol(METHODS, seeds, 20, 10, 3, 4.0, 0.5, 2)
    problem = Problem("m", "numbers", alignment, 8, 100, 50, 16, "label_words")
    return Comparison(problem, protocol, FinishedRuns(folder / "runs.jsonl", SETTINGS))


def made_up(job: Job) -> dict[str, Any]:
    """A run whose loss is least at a rate of 5e-5."""
    if job.method == "broken":
        raise ValueError("it cannot.")
    return {"scores": [{"loss": abs(job.learning_rate - 5e-5)}]}


def test_trials_choose_the_rate_of_the_full_runs_and_failures_stop_one_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job] = []

    def noted(job: Job) -> dict[str, Any]:
        jobs.append(job)
        return made_up(job)

    monkeypatch.setattr(schedule, "run", noted)
    pair = [comparison(tmp_path), comparison(tmp_path, "head")]
    run_all(pair, InThisProcess(), 1, lambda comparison, job: None)
    first = [job for job in jobs if job.alignment == "prompt"]
    assert [(job.method, job.seed) for job in first] == [
        ("zero-shot", 0),
        *[("good", TRIAL_SEED)] * 3,
        ("good", 0),
        ("good", 1),
        ("broken", TRIAL_SEED),
    ]
    assert [job.learning_rate for job in first if job.method == "good"] == [5e-5, 2e-4, 1.25e-5, 5e-5, 5e-5]
    assert [job.seed for job in jobs if job.alignment == "head"][:2] == [0, 1], "each seed draws a head of its own"
    for each in pair:
        assert each.failed == {"broken": "ValueError: it cannot."}
        assert list(each.results()) == ["good"] and not each.results()["good"].at_edge
        assert each.made() == each.total() - 5
    # What is finished is not made again, whoever asks.
    jobs.clear()
    run_all([comparison(tmp_path, seeds=(0, 1, 2))], InThisProcess(), 1, lambda comparison, job: None)
    assert [(job.method, job.seed) for job in jobs] == [("good", 2), ("broken", TRIAL_SEED)]


def test_networks_with_random_weights_begin_with_larger_rates(tmp_path: Path) -> None:
    rates = {a: comparison(tmp_path, a).plan("good").wanted[0].learning_rate for a in ("prompt", "scratch")}
    assert rates["scratch"] == pytest.approx(100 * rates["prompt"])


def test_a_model_that_cannot_be_evaluated_ends_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: Job) -> dict[str, Any]:
        raise OSError("no such model")

    monkeypatch.setattr(schedule, "run", broken)
    with pytest.raises(OSError, match="no such model"):
        run_all([comparison(tmp_path)], InThisProcess(), 1, lambda comparison, job: None)
