"""Runs that end when their forward passes or their seconds are spent, as they would end at `max_steps`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TinyTask, assert_same_bits, seeded, tiny_opt, weights_of
from tests.evaluation.test_rows import Joins
from tests.parallel.launch import run
from tests.rules.helpers import estimator_for
from tests.trainer.runs import At, SaveAt, config, logged, make_trainer, passes_of_steps, trained
from zo_hf import RowLosses, ZOTrainer
from zo_hf.estimators import ESTIMATORS, Estimator
from zo_hf.estimators.probe import Probe
from zo_hf.method_info import Method
from zo_hf.rules import RULES
from zo_hf.trainer import budget

SEQUENTIAL = {"zo_batched_probes": False, "zo_rows_per_direction": 0, "logging_steps": 1}
STEPS = {"eval_strategy": "steps", "eval_steps": 100, "save_strategy": "steps", "save_steps": 100}


class Stream(torch.utils.data.IterableDataset):
    """As many rows as are asked for."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        task = TinyTask()
        return (task[index % 64] for index in range(10**6))


# Forward passes.


@pytest.mark.parametrize(("limit", "directions"), [(4, 1), (5, 1), (4, 2), (11, 2), (12, 2)])
def test_a_step_that_would_go_beyond_is_not_begun(tmp_path: Path, limit: int, directions: int) -> None:
    options = SEQUENTIAL | {"zo_num_directions": directions, "max_steps": 100}
    trainer = trained(tmp_path, zo_max_forward_passes=limit, **options)
    cost = 2 * directions
    assert passes_of_steps(trainer) == list(range(cost, limit + 1, cost))
    assert trainer.state.global_step == limit // cost
    reference = trained(tmp_path, **options | {"max_steps": limit // cost})
    assert_same_bits(weights_of(trainer.model), weights_of(reference.model))


def test_the_look_at_the_rows_is_paid_for(tmp_path: Path) -> None:
    """7, 2, 2: the first step finds out whether the loss comes apart by rows, and whether one pass takes both signs."""
    for limit, expected in ((11, [7, 9, 11]), (12, [7, 9, 11]), (13, [7, 9, 11, 13])):
        assert passes_of_steps(trained(tmp_path, zo_max_forward_passes=limit, max_steps=100)) == expected
    with pytest.raises(
        ValueError, match=r"^zo_max_forward_passes=10 is too small for the first step, which may take 11.*\.$"
    ):
        trained(tmp_path, zo_max_forward_passes=10, max_steps=100)


class Rows(ZOTrainer):
    """The loss of every row of `Joins`."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> RowLosses:
        scores = model(inputs["ids"], inputs["mask"])
        return RowLosses(torch.nn.functional.cross_entropy(scores, inputs["labels"], reduction="none"))


class DependentRows(Rows):
    def compute_loss(self, *args: Any, **kwargs: Any) -> RowLosses:
        losses = super().compute_loss(*args, **kwargs)
        return RowLosses(losses + losses.mean())


@pytest.mark.parametrize(
    ("kind", "length", "first"),
    [(Rows, 6, 5), (Rows, 4, 7), (DependentRows, 6, 7), (DependentRows, 4, 7)],
    ids=["apart", "joined", "together", "joined together"],
)
def test_whatever_the_first_step_finds_is_within_the_budget(
    tmp_path: Path, kind: type[ZOTrainer], length: int, first: int
) -> None:
    """Rows of one length that a model joins take two passes more, and a loss that does not come apart is evaluated again."""
    mask = (torch.arange(6) < length).float()
    rows = [{"ids": torch.arange(i, i + 6), "mask": mask, "labels": torch.tensor(i % 4)} for i in range(8)]
    options: dict[str, Any] = {"more": {"train_dataset": rows}, "max_steps": 1, "zo_rows_per_direction": 1}
    options["remove_unused_columns"] = False
    assert passes_of_steps(trained(tmp_path, Joins(True), kind, **options)) == [first]
    with pytest.raises(ValueError, match="is too small for the first step, which may take 11, 9 of them to find out"):
        trained(tmp_path, Joins(True), kind, zo_max_forward_passes=10, **options)


class Detaches(ZOTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(*args, **kwargs)
        return loss * loss.detach()


def test_values_that_a_loss_detaches_are_paid_for(tmp_path: Path) -> None:
    """4, 6, 6: from the second step on, every micro-batch is evaluated once more, before its probes."""
    options = SEQUENTIAL | {"max_steps": 100, "gradient_accumulation_steps": 2}
    for limit, expected in ((15, [4, 10]), (16, [4, 10, 16])):
        assert passes_of_steps(trained(tmp_path, None, Detaches, zo_max_forward_passes=limit, **options)) == expected


def test_a_single_probe_shares_a_pass_with_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4, 1, 1, 1: there is nothing to evaluate in one pass, so the first step looks at the rows alone."""

    class OneValue(Estimator):
        name = "one_sided"  # which goes by rows
        about = Method("one value (Flaxman, Kalai and McMahan 2005)", forwards="1")

        def probes(self) -> list[Probe]:
            return [Probe(0, self.eps)]

        def projected_gradients(self, losses: Sequence[float]) -> list[float]:
            return [losses[0] / self.eps]

        def loss(self, losses: Sequence[float]) -> float:
            return losses[0]

    monkeypatch.setitem(ESTIMATORS, "one_sided", OneValue)
    options = {"zo_estimator": "one_sided", "zo_rows_per_direction": 1, "zo_batched_probes": True, "max_steps": 100}
    assert passes_of_steps(trained(tmp_path, zo_max_forward_passes=7, **options)) == [4, 5, 6, 7]
    with pytest.raises(
        ValueError, match=r"^zo_max_forward_passes=6 is too small for the first step, which may take 7.*\.$"
    ):
        trained(tmp_path, zo_max_forward_passes=6, **options)


def test_tangents_for_every_row_are_paid_for(tmp_path: Path) -> None:
    """8, 2: the first step looks three times more at one micro-batch, in passes that count as two."""
    model = seeded(tiny_opt, attn_implementation="eager")
    options = {"zo_estimator": "forward_gradient", "max_steps": 100}
    assert passes_of_steps(trained(tmp_path, model, zo_max_forward_passes=15, **options)) == [8, 10, 12, 14]
    with pytest.raises(
        ValueError, match=r"^zo_max_forward_passes=13 is too small for the first step, which may take 14.*\.$"
    ):
        trained(tmp_path, model, zo_max_forward_passes=13, **options)


# A rule that evaluates the loss by itself, and one whose steps differ, with every estimator.
METHODS = [(estimator, rule) for estimator in ESTIMATORS for rule in ("none", "conservative", "svrg")]
METHODS += [(estimator_for(rule), rule) for rule in RULES if rule not in ("none", "conservative", "svrg")]


@pytest.mark.parametrize(("estimator", "rule"), METHODS)
def test_the_cost_of_a_step_is_known_before_it_is_taken(tmp_path: Path, estimator: str, rule: str) -> None:
    """Whatever the method: with one pass less than three steps take, there are two."""
    model = seeded(tiny_opt, attn_implementation="eager", num_hidden_layers=1)
    options = SEQUENTIAL | {"zo_estimator": estimator, "zo_rule": rule, "zo_num_directions": 2}
    try:
        spent = passes_of_steps(trained(tmp_path, model, max_steps=3, **options))
    except ValueError:
        return  # they do not go together
    assert len(spent) == 3
    trainer = trained(tmp_path, model, max_steps=-1, zo_max_forward_passes=spent[-1] - 1, **options)
    assert passes_of_steps(trainer) == spent[:2]


def test_micro_batches_are_counted_and_a_short_one_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    """64 rows in batches of 8 by 3: steps of 3, 3 and 2 micro-batches, two passes each."""
    for limit, expected in ((15, [6, 12]), (16, [6, 12, 16]), (21, [6, 12, 16]), (22, [6, 12, 16, 22])):
        trainer = trained(
            tmp_path, zo_max_forward_passes=limit, max_steps=-1, gradient_accumulation_steps=3, **SEQUENTIAL
        )
        assert passes_of_steps(trainer) == expected
        assert trainer.state.max_steps == len(expected)


@pytest.mark.parametrize("batch", [8, 24])
def test_schedules_end_where_the_budget_does(tmp_path: Path, batch: int) -> None:
    """Without max_steps the learning rate is the one of a run of that many steps, whatever num_train_epochs says."""
    options = SEQUENTIAL | {"lr_scheduler_type": "linear", "per_device_train_batch_size": batch}
    trainer = trained(tmp_path, zo_max_forward_passes=41, max_steps=-1, num_train_epochs=1, **options)
    reference = trained(tmp_path, max_steps=20, **options)
    assert logged(trainer, "learning_rate") == logged(reference, "learning_rate")
    assert trainer.state.max_steps == 20
    assert_same_bits(weights_of(trainer.model), weights_of(reference.model))
    assert trainer.args.max_steps == -1, "the same arguments may be for other data next time"


def test_data_without_a_length_need_no_max_steps(tmp_path: Path) -> None:
    more = {"train_dataset": Stream()}
    options = SEQUENTIAL | {"gradient_accumulation_steps": 2, "max_steps": -1}
    assert passes_of_steps(trained(tmp_path, more=more, zo_max_forward_passes=14, **options)) == [4, 8, 12]
    with pytest.raises(ValueError, match="max_steps"):
        trained(tmp_path, more=more, **options)


def test_max_steps_ends_a_run_that_has_not_spent_all(tmp_path: Path) -> None:
    assert passes_of_steps(trained(tmp_path, max_steps=2, zo_max_forward_passes=100, **SEQUENTIAL)) == [2, 4]


@pytest.mark.parametrize("limit", [{"zo_max_forward_passes": 6}, {"zo_max_time": 1e-9}, {"max_steps": 3}])
def test_the_end_is_evaluated_and_saved_as_at_max_steps(tmp_path: Path, limit: dict[str, Any]) -> None:
    trainer = trained(tmp_path, **{"max_steps": 50} | SEQUENTIAL | STEPS | limit)
    last = 1 if "zo_max_time" in limit else 3
    assert trainer.state.global_step == last and len(logged(trainer, "eval_loss")) == 1
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{last}"]


def test_a_resumed_run_goes_on_spending_what_is_left(tmp_path: Path) -> None:
    options = {"zo_max_forward_passes": 13, "max_steps": -1, "lr_scheduler_type": "linear", **SEQUENTIAL}
    whole = trained(tmp_path / "whole", **options)
    trained(tmp_path / "killed", more={"callbacks": [SaveAt(4)]}, **options)
    resumed = trained(tmp_path / "killed", resume=True, **options)
    assert passes_of_steps(resumed) == passes_of_steps(whole) == [2, 4, 6, 8, 10, 12]
    assert logged(resumed, "learning_rate") == logged(whole, "learning_rate")
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))


@pytest.mark.parametrize("saved", [4, 8], ids=["within an epoch", "at its end"])
@pytest.mark.parametrize("option", ["zo_max_forward_passes", "zo_max_time"])
def test_a_run_that_is_resumed_with_nothing_left_takes_no_step(tmp_path: Path, saved: int, option: str) -> None:
    limit = {option: 1e-9 if option == "zo_max_time" else 2 * saved + 1}
    first = trained(tmp_path, more={"callbacks": [SaveAt(saved)]}, max_steps=saved, **SEQUENTIAL)
    resumed = trained(tmp_path, resume=True, max_steps=20, **SEQUENTIAL | limit)
    assert resumed.state.global_step == saved
    assert_same_bits(weights_of(resumed.model), weights_of(first.model))


def test_a_step_with_more_micro_batches_than_expected_is_not_begun_either(tmp_path: Path) -> None:
    """ignore_data_skip begins an epoch anew in the middle of one, so that a step is not where its number says."""
    options = {"max_steps": 20, "gradient_accumulation_steps": 3, **SEQUENTIAL}
    trained(tmp_path, more={"callbacks": [SaveAt(2)]}, **options | {"max_steps": 2})
    resumed = trained(tmp_path, resume=True, zo_max_forward_passes=16, ignore_data_skip=True, **options)
    assert passes_of_steps(resumed)[-1] == 12 and resumed.state.global_step == 2


# Time.


class Clock:
    """Stands still except for what is added to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(budget, "monotonic", lambda: self.now)

    def ticks(self, seconds: float) -> At:
        """A callback that takes so long in every step."""

        def tick(state: Any, **kwargs: Any) -> None:
            self.now += seconds

        return At(None, tick)


def timed(
    folder: Path, clock: Clock, seconds: float, limit: float | None, resume: bool = False, **options: Any
) -> ZOTrainer:
    """A run whose steps take `seconds`, by the clock."""
    trainer = make_trainer(folder, zo_max_time=limit, max_steps=50, **options)
    trainer.callback_handler.callbacks.insert(0, clock.ticks(seconds))
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


@pytest.mark.parametrize(("limit", "steps"), [(0.1, 1), (10.0, 1), (10.1, 2), (45.0, 5)])
def test_the_step_under_way_when_time_is_up_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, steps: int
) -> None:
    clock = Clock(monkeypatch)
    assert timed(tmp_path, clock, 10.0, limit).state.global_step == steps
    clock.now += 10_000  # before another training of the same arguments
    assert timed(tmp_path, clock, 10.0, limit).state.global_step == steps


def test_time_before_a_resume_counts_and_time_between_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    first = timed(tmp_path, clock, 10.0, 45.0, **STEPS)
    assert first.state.global_step == 5 and (tmp_path / "checkpoint-5").exists()
    clock.now += 10_000
    assert timed(tmp_path, clock, 10.0, 75.0, True, **STEPS).state.global_step == 8
    clock.now += 10_000
    assert timed(tmp_path, clock, 10.0, None, True, **STEPS).state.global_step == 50


def test_a_checkpoint_of_a_log_alone_knows_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    options = STEPS | {"save_only_trajectory": True}
    timed(tmp_path, clock, 10.0, 25.0, **options)
    assert timed(tmp_path, clock, 10.0, 45.0, True, **options).state.global_step == 5


RANKS = """
import os
import sys
from pathlib import Path
import torch
from tests.conftest import weights_of
from tests.trainer.runs import At, logged, make_trainer
from zo_hf.trainer import budget

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
now = 0.0
budget.monotonic = lambda: now

def tick(state, **kwargs):
    global now
    now += 10.0 if rank == 0 else 1.0

results = {}
for name, limit in {"time": {"zo_max_time": 35.0}, "passes": {"zo_max_forward_passes": 11}, "none": {}}.items():
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "zo_batched_probes": False, "zo_rows_per_direction": 0}
    trainer = make_trainer(folder / name, **options | limit)
    trainer.callback_handler.callbacks.insert(0, At(None, tick))
    trainer.train()
    bytes_sent = logged(trainer, "zo/bytes_communicated")
    results[name] = trainer.state.global_step, weights_of(trainer.model), bytes_sent
torch.save(results, folder / f"{rank}.pt")
"""


@pytest.mark.slow
def test_processes_stop_at_the_same_step_by_the_first_ones_clock(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(RANKS)
    run(tmp_path / "run.py", 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, steps in {"time": 4, "passes": 5, "none": 6}.items():
        assert first[name][0] == second[name][0] == steps
        assert_same_bits(first[name][1], second[name][1])
    # The verdict is one byte a step; forward passes need none.
    time, passes, none = (first[name][2] for name in ("time", "passes", "none"))
    assert passes == none[:5]
    assert [a - b for a, b in zip(time, none[:4], strict=True)] == [1, 2, 3, 4]


# What is logged, and what is refused.


def test_evaluations_say_how_many_forward_passes_led_to_them(tmp_path: Path) -> None:
    options = SEQUENTIAL | {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "logging_steps": 100}
    seen: list[dict[str, float]] = []
    trainer = make_trainer(tmp_path, max_steps=4, **options)
    evaluate = trainer.evaluate
    trainer.evaluate = lambda **kwargs: seen.append(evaluate(**kwargs)) or seen[-1]
    trainer.train()
    assert [
        (line["step"], line["zo/forward_passes"]) for line in trainer.state.log_history if "eval_loss" in line
    ] == [
        (0, 0),
        (2, 4),
        (4, 8),
    ]
    # A hyperparameter search adds up all that evaluate returns.
    assert len(seen) == 3 and all({key.partition("_")[0] for key in line} == {"eval", "epoch"} for line in seen[1:])
    trainer.evaluate()
    assert "zo/forward_passes" not in trainer.state.log_history[-1], "no training is under way"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"zo_max_forward_passes": 0},
            "zo_max_forward_passes=0 must be a whole number of at least 1; leave it out for no limit.",
        ),
        (
            {"zo_max_time": 0.0},
            "zo_max_time=0.0 must be a finite number above 0; leave it out for no limit, or give seconds.",
        ),
        (
            {"zo_max_time": -1.0},
            "zo_max_time=-1.0 must be a finite number above 0; leave it out for no limit, or give seconds.",
        ),
        (
            {"zo_max_time": float("nan")},
            "zo_max_time=nan must be a finite number above 0; leave it out for no limit, or give seconds.",
        ),
    ],
)
def test_a_budget_that_is_none_is_refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as refusal:
        config(tmp_path, **options)
    assert str(refusal.value) == sentence


def test_a_budget_that_pays_for_no_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        trained(tmp_path, zo_max_forward_passes=3, zo_num_directions=2, max_steps=-1, **SEQUENTIAL)
    assert str(refusal.value) == "zo_max_forward_passes=3 is too small for the first step, which takes 4; raise it."
