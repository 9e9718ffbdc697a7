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

METHODS = {
    "good": Method("g", 1e-4, {"zo_rank": 2}),
    "broken": Method("g", 1e-4, {}),
    "divided": Method("g", 5e-5, {"zo_normalize": True}),
}


def comparison(
    folder: Path,
    alignment: str = "prompt",
    seeds: tuple[int, ...] = (0, 1),
    names: tuple[str, ...] = ("good", "broken"),
    trial_seeds: int = 1,
) -> Comparison:
    protocol = Protocol({name: METHODS[name] for name in names}, seeds, 20, 10, 3, trial_seeds, 4.0, 0.5, 2)
    problem = Problem("m", "numbers", alignment, 8, 100, 50, 16, "label_words")
    return Comparison(problem, protocol, FinishedRuns(folder / "runs.jsonl", SETTINGS))


def ignored(comparison: Comparison, job: Job) -> None:
    """Do nothing at the start or the end of a run."""


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
    run_all(pair, InThisProcess(), 1, ignored, ignored)
    first = [job for job in jobs if job.alignment == "prompt"]
    assert [(job.method, job.seed) for job in first] == [
        ("zero-shot", 0),
        *[("good", TRIAL_SEED)] * 3,
        ("broken", TRIAL_SEED),
        ("good", 0),
        ("good", 1),
    ]
    assert [job.learning_rate for job in first if job.method == "good"] == [5e-5, 2e-4, 1.25e-5, 5e-5, 5e-5]
    assert [job.seed for job in jobs if job.alignment == "head"][:2] == [0, 1], "each seed draws a head of its own"
    for each in pair:
        assert each.failed == {"broken": "ValueError: it cannot."}
        assert list(each.results()) == ["good"] and not each.results()["good"].at_edge
        assert each.passes()[1] == 0, "a method that failed has no runs left"
    # What is finished is not made again, whoever asks.
    jobs.clear()
    run_all([comparison(tmp_path, seeds=(0, 1, 2))], InThisProcess(), 1, ignored, ignored)
    assert [(job.method, job.seed) for job in jobs] == [("broken", TRIAL_SEED), ("good", 2)]


def test_seeds_come_in_turn_and_the_passes_left_are_known_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "run", made_up)
    one = comparison(tmp_path, names=("good", "divided"))
    order: list[tuple[str, int]] = []
    counts: list[tuple[int, int]] = []

    def starts(comparison: Comparison, job: Job) -> None:
        order.append((job.method, job.seed))
        counts.append(comparison.passes())

    run_all([one], InThisProcess(), 1, starts, ignored)
    assert order[-4:] == [("good", 0), ("divided", 0), ("good", 1), ("divided", 1)]
    # A score takes 7 batches of 8 for 50 rows: once for the untrained model and for a trial of 10 passes, and twice in
    # a full run of 20.
    total = 7 + 2 * (3 * (10 + 7) + 2 * (20 + 2 * 7))
    assert {made + left for made, left in counts} == {total} and counts[0] == (0, total)
    assert one.passes() == (total, 0)


def test_trials_go_on_while_the_best_rate_is_at_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best: dict[str, float] = {}
    monkeypatch.setattr(schedule, "run", lambda job: {"scores": [{"loss": abs(job.learning_rate - best["rate"])}]})
    # From 5e-5, the fourth trial finds a rate of 8e-4, and the fifth that there is none beyond; 1 is too far.
    for name, rate, trials, at_edge in (("near", 8e-4, 5, False), ("far", 1.0, 6, True)):
        best["rate"] = rate
        (tmp_path / name).mkdir()
        one = comparison(tmp_path / name, names=("good",))
        jobs: list[Job] = []
        run_all([one], InThisProcess(), 1, ignored, lambda _, job, jobs=jobs: jobs.append(job))
        assert sum(job.seed == TRIAL_SEED for job in jobs) == trials
        assert one.results()["good"].at_edge == at_edge


def test_the_mean_over_the_seeds_of_trials_chooses_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each seed alone prefers an end, and at that end the other one is far off.
    losses = {(2e-4, TRIAL_SEED): 0.1, (1.25e-5, TRIAL_SEED): 5.0, (2e-4, TRIAL_SEED + 1): 5.0, (1.25e-5, TRIAL_SEED + 1): 0.1}  # fmt: skip
    monkeypatch.setattr(
        schedule, "run", lambda job: {"scores": [{"loss": losses.get((job.learning_rate, job.seed), 1.0)}]}
    )
    one = comparison(tmp_path, names=("good",), trial_seeds=2)
    jobs: list[Job] = []
    run_all([one], InThisProcess(), 1, ignored, lambda _, job: jobs.append(job))
    found = one.results()["good"]
    assert found.trials == pytest.approx({5e-5: 1.0, 2e-4: 2.55, 1.25e-5: 2.55})
    assert found.learning_rate == 5e-5 and not found.at_edge
    seeds = [job.seed for job in jobs if job.budget]
    assert seeds == [*[TRIAL_SEED] * 3, *[TRIAL_SEED + 1] * 3, 0, 1], "trials seed by seed, then full runs"


def test_a_factor_is_for_steps_that_grow_with_slopes(tmp_path: Path) -> None:
    one = comparison(tmp_path, names=("good", "divided"))
    assert {job.method: job.learning_rate for job in one.wanted()[-6:][::3]} == {"good": 5e-5, "divided": 5e-5}


def test_networks_with_random_weights_begin_with_larger_rates(tmp_path: Path) -> None:
    rates = {a: comparison(tmp_path, a).plan("good").wanted[0].learning_rate for a in ("prompt", "scratch")}
    assert rates["scratch"] == pytest.approx(100 * rates["prompt"])


def test_a_model_that_cannot_be_evaluated_ends_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: Job) -> dict[str, Any]:
        raise OSError("no such model")

    monkeypatch.setattr(schedule, "run", broken)
    with pytest.raises(OSError, match="no such model"):
        run_all([comparison(tmp_path)], InThisProcess(), 1, ignored, ignored)
