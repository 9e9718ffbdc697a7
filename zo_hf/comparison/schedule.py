"""The runs of a comparison: which are finished, which can start, and how they are made, resumed after every kill.

Every method first tries the same number of learning rates, with seeds of their own. The rate with the least development
loss, in the mean over these seeds, then makes a full run with each seed. A run that is in the file of finished runs is
not made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from zo_hf.comparison.finished_runs import FinishedRuns
from zo_hf.comparison.job import Job, Problem
from zo_hf.comparison.methods import Method, follows_slopes
from zo_hf.comparison.result import Result
from zo_hf.comparison.run import run
from zo_hf.comparison.tuning import best_rate, first_rates, is_complete, next_rate

#: The first seed of trials. The others follow it.
TRIAL_SEED = 12_345
#: Factors on the centers of learning rates: random weights want larger steps than pretrained ones, and a fitted head, whose
#: weights are large, smaller ones.
RATE_FACTORS = {"prompt": 1.0, "head": 1.0, "fitted": 0.01, "scratch": 100.0}


@dataclass(frozen=True)
class Protocol:
    """The part of a comparison that is the same for all its problems.

    Attributes:
        methods: the methods by name.
        seeds: seeds of the full runs.
        forward_passes: forward passes of a full run.
        trial_forward_passes: forward passes of a trial.
        rates: number of learning rates that each method tries.
        trial_seeds: number of trials with each rate. One trial may choose a wrong rate.
        ratio: ratio of the first learning rates that are tried.
        factor: factor on the centers of learning rates, of methods whose steps grow with the slopes of the loss.
        evaluations: number of scores during a full run.
    """

    methods: Mapping[str, Method]
    seeds: Sequence[int]
    forward_passes: int
    trial_forward_passes: int
    rates: int
    trial_seeds: int
    ratio: float
    factor: float
    evaluations: int

    @property
    def seeds_of_trials(self) -> range:
        """The seeds of trials."""
        return range(TRIAL_SEED, TRIAL_SEED + self.trial_seeds)


@dataclass(frozen=True)
class Plan:
    """The progress of one method.

    Attributes:
        made: finished runs.
        wanted: runs that can start now.
        later: forward passes of the runs that follow them, without rates beyond the number that was asked for.
        result: the method's result, once all full runs are finished.
    """

    made: list[Job]
    wanted: list[Job]
    later: int = 0
    result: Result | None = None


class Comparison:
    """The runs of all methods on one problem: finished, possible now, and failed.

    Attributes:
        problem: the problem.
        failed: the errors of methods that failed, by name.
    """

    def __init__(self, problem: Problem, protocol: Protocol, finished: FinishedRuns) -> None:
        self.problem, self.protocol, self.finished = problem, protocol, finished
        self.failed: dict[str, str] = {}

    def job(self, method: str, rate: float, seed: int, budget: int, evaluations: int) -> Job:
        """Return a run of a method."""
        known = self.protocol.methods.get(method)
        options = json.dumps(dict(known.options) if known else {}, sort_keys=True)
        return Job(**asdict(self.problem), method=method, options=options, learning_rate=rate, seed=seed, budget=budget, evaluations=evaluations)  # fmt: skip

    def untrained(self) -> list[Job]:
        """Return the evaluations of the untrained model: one, or with fresh weights one for each seed."""
        has_fresh_weights = self.problem.alignment in ("head", "scratch")
        seeds = self.protocol.seeds if has_fresh_weights else list(self.protocol.seeds)[:1]
        return [self.job("zero-shot", 0.0, seed, 0, 1) for seed in seeds]

    def zero_shot(self) -> list[dict[str, Any]] | None:
        """Return the evaluations of the untrained model, or None before all are finished."""
        made, wanted = self.divided(self.untrained())
        return None if wanted else list(made.values())

    def find(self, job: Job) -> dict[str, Any] | None:
        """Return the finished run of a job, or None."""
        return self.finished.find(asdict(job))

    def divided(self, jobs: Sequence[Job]) -> tuple[dict[Job, dict[str, Any]], list[Job]]:
        """Return the finished runs of some jobs by job, and the jobs that have none."""
        made = {job: found for job in jobs if (found := self.find(job)) is not None}
        return made, [job for job in jobs if job not in made]

    def plan(self, method: str) -> Plan:
        """Return which runs of a method can start next, given its finished runs."""
        protocol = self.protocol

        def trials(rate: float) -> list[Job]:
            seeds, budget = protocol.seeds_of_trials, protocol.trial_forward_passes
            return [self.job(method, rate, seed, budget, 0) for seed in seeds]

        def full(rate: float) -> list[Job]:
            seeds, budget = protocol.seeds, protocol.forward_passes
            return [self.job(method, rate, seed, budget, protocol.evaluations) for seed in seeds]

        center = self.center(protocol.methods[method])
        rates = first_rates(center, protocol.ratio, protocol.rates)
        while True:
            made, wanted = self.divided([job for rate in rates for job in trials(rate)])
            if wanted:
                more = max(protocol.rates - len(rates), 0) * sum(job.passes for job in trials(center))
                return Plan(list(made), wanted, more + sum(job.passes for job in full(center)))
            losses = {rate: fmean(made[job]["scores"][-1]["loss"] for job in trials(rate)) for rate in rates}
            if is_complete(losses, protocol.rates):
                break
            rates.append(next_rate(losses, protocol.ratio))
        runs, wanted = self.divided(full(best_rate(losses)))
        result = None
        if not wanted:
            result = Result(protocol.methods[method].group, losses, list(runs.values()))
        return Plan(list(made) + list(runs), wanted, result=result)

    def center(self, method: Method) -> float:
        """Return the center of a method's grid of learning rates."""
        factor = self.protocol.factor if follows_slopes(method.options) else 1.0
        return method.rate * factor * RATE_FACTORS[self.problem.alignment]

    def results(self) -> dict[str, Result]:
        """Return the results of the methods whose runs are all finished."""
        plans = {method: self.plan(method).result for method in self.protocol.methods}
        return {method: result for method, result in plans.items() if result is not None}

    def passes(self) -> tuple[int, int]:
        """Return the forward passes that are made, and those that are left, as far as can be known."""
        made, left = (sum(job.passes for job in jobs) for jobs in self.divided(self.untrained()))
        for method in self.protocol.methods:
            plan = self.plan(method)
            made += sum(job.passes for job in plan.made)
            if method not in self.failed:
                left += sum(job.passes for job in plan.wanted) + plan.later
        return made, left

    def wanted(self) -> list[Job]:
        """Return all runs that can start now: trials, then full runs seed by seed, so that methods can be compared early."""
        jobs = self.divided(self.untrained())[1]
        seeds = [*self.protocol.seeds_of_trials, *self.protocol.seeds]
        plans = [self.plan(method).wanted for method in self.protocol.methods if method not in self.failed]
        return jobs + sorted((job for wanted in plans for job in wanted), key=lambda job: seeds.index(job.seed))


def run_all(
    comparisons: Sequence[Comparison],
    executor: Executor,
    processes: int,
    starts: Callable[[Comparison, Job], None],
    done: Callable[[Comparison, Job], None],
) -> None:
    """Make all runs of some comparisons, one comparison after the other.

    Args:
        comparisons: the comparisons.
        executor: makes the runs.
        processes: number of runs at a time.
        starts: called with the comparison and the run before each run.
        done: called with them after each run.

    Raises:
        SystemExit: a process was killed.
    """
    pending: dict[Future[dict[str, Any]], tuple[Comparison, Job]] = {}
    while True:
        for comparison in comparisons:
            if len(pending) >= processes:
                break
            for job in comparison.wanted():
                if len(pending) < processes and all(job != other for _, other in pending.values()):
                    starts(comparison, job)
                    pending[executor.submit(run, job)] = comparison, job
        if not pending:
            return
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            comparison, job = pending.pop(future)
            _note_end(comparison, job, future)
            done(comparison, job)


def _note_end(comparison: Comparison, job: Job, future: Future[dict[str, Any]]) -> None:
    """Keep the result of a run, or why it failed.

    Raises:
        SystemExit: its process was killed.
    """
    error = future.exception()
    if error is None:
        comparison.finished.add(asdict(job) | future.result())
    elif isinstance(error, BrokenProcessPool):
        raise SystemExit(
            "A process was killed, probably out of memory; use fewer --processes. Finished runs are kept."
        )
    elif isinstance(error, Exception) and job.budget:
        comparison.failed[job.method] = f"{type(error).__name__}: {error}"
    else:
        raise error
