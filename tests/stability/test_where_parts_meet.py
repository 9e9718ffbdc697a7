"""The monitor and the search for a learning rate, beside budgets, other optimizers, restarts and small data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import TinyTask
from tests.trainer.runs import config, logged, make_trainer, trained
from zo_hf.lr_finder.find import forward_passes_of_search
from zo_hf.trainer import learning_rate as trainer_learning_rate
from zo_hf.trainer.budget import Budget
from zo_hf.trainer.learning_rate import schedule_of


@settings(deadline=None, max_examples=60)
@given(
    budget=st.integers(30, 700),
    every=st.integers(0, 7),
    svrg=st.booleans(),
    adam=st.booleans(),
    batches=st.none() | st.integers(1, 13),
    accumulation=st.integers(1, 3),
)
def test_planned_steps_are_those_that_are_paid_for(
    budget: int, every: int, svrg: bool, adam: bool, batches: int | None, accumulation: int
) -> None:
    options: dict[str, Any] = {"zo_max_forward_passes": budget, "gradient_accumulation_steps": accumulation}
    options |= {"max_steps": -1, "zo_batched_probes": False, "zo_fold_steps": 0}
    if svrg:
        every = 0  # the monitor refuses it
        options |= {"zo_rule": "svrg", "zo_svrg_batches": 3, "zo_svrg_steps": 2}
    options |= {"zo_stability_steps": every, "optim": "adamw_torch" if adam else "sgd"}
    plan = Budget(config("unused", **options))
    plan._batches = batches

    spent = steps = 0
    while True:
        at = steps % -(-batches // accumulation) if batches else 0
        micro_batches = min(accumulation, batches - at * accumulation) if batches else accumulation
        cost = 4 if svrg and steps % 5 >= 3 else 2
        if every and steps % every == 0:
            cost += (3 if steps else 0) if adam else 1
        spent += cost * micro_batches
        if spent > budget:
            break
        steps += 1
    assert plan.steps() == max(1, steps)


def test_a_budget_without_end_is_planned_at_once() -> None:
    began = time.process_time()
    endless = config("unused", zo_max_forward_passes=10**12, max_steps=-1, zo_stability_steps=10)
    assert Budget(endless).steps() == 10 * 10**12 // 21
    assert time.process_time() - began < 5


def test_schedules_of_long_runs_are_looked_at_at_once(tmp_path: Path) -> None:
    args = config(tmp_path, lr_scheduler_type="linear")
    began = time.process_time()
    schedule = schedule_of(args, 10**9, 10**9, 1e-5)
    assert np.mean(schedule, axis=0) == pytest.approx([1 / 2, 1 / 3], rel=1e-3)
    assert time.process_time() - began < 5


def test_schedules_that_restart_more_often_than_they_are_looked_at(tmp_path: Path) -> None:
    cosine = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 64}}
    schedule = schedule_of(config(tmp_path, **cosine), 10_000, 10_000, 1e-5)
    assert np.array(schedule) == pytest.approx(np.tile([1 / 2, 3 / 8], (len(schedule), 1)), abs=0.02)


def test_a_run_that_its_passes_end_early_is_predicted_as_long_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    search = trainer_learning_rate.find_learning_rate

    def spy(*args: Any) -> Any:
        seen["steps"], seen["schedule"] = args[4], args[6]
        return search(*args)

    monkeypatch.setattr(trainer_learning_rate, "find_learning_rate", spy)
    options = {"zo_max_forward_passes": 800, "lr_scheduler_type": "linear", "zo_batched_probes": False}
    make_trainer(tmp_path, max_steps=3800, **options).find_learning_rate()
    assert seen["steps"] == (800 - 40) // 2
    assert min(seen["schedule"])[0] == pytest.approx(0.9, abs=0.01)


def test_a_restart_plans_for_the_search_again(tmp_path: Path) -> None:
    plan = Budget(config(tmp_path, zo_max_forward_passes=1000, max_steps=-1, learning_rate="auto"))
    args = plan.args
    with plan.of(args, divides=False, searches=True):
        assert plan.resolved(args).max_steps == (1000 - forward_passes_of_search(50, 1)) // 2
        assert args.max_steps == -1


@pytest.mark.parametrize("given_as", ["class", "object"])
def test_an_adam_of_the_users_is_planned_for_too(tmp_path: Path, given_as: str) -> None:
    more: dict[str, Any] = {"optimizer_cls_and_kwargs": (torch.optim.Adam, {"lr": 1e-3})}
    if given_as == "object":
        trainer = make_trainer(tmp_path)
        more = {"optimizers": (torch.optim.Adam(trainer.model.parameters(), lr=1e-3), None)}
        more["model"] = trainer.model
    options = {"zo_max_forward_passes": 60, "max_steps": -1, "zo_stability_steps": 1, "lr_scheduler_type": "linear"}
    model = more.pop("model", None)
    run = trained(tmp_path, model, more=more, zo_batched_probes=False, learning_rate=1e-3, **options)
    assert run.state.global_step == 12  # 2 passes, and then 5 in each
    assert run.lr_scheduler.get_last_lr()[0] == 0


def test_a_first_step_that_the_search_leaves_unpaid_is_refused(tmp_path: Path) -> None:
    options = {"zo_num_directions": 100, "zo_max_forward_passes": 400, "max_steps": -1, "learning_rate": "auto"}
    options |= {"zo_rows_per_direction": 0}  # by rows, the search has already looked at how losses can be evaluated
    with pytest.raises(ValueError, match=r"^zo_max_forward_passes=400 is too small for the first step.*'auto'.*\.$"):
        trained(tmp_path, **options)


def test_a_search_for_hyperparameters_may_leave_a_word(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, learning_rate="auto")
    trainer.args.learning_rate = "0.0001"  # type(before)(value), as Trainer sets what it tries
    trainer.train()
    assert set(logged(trainer, "learning_rate")) == {1e-4}


@pytest.mark.slow
@pytest.mark.parametrize("rows", [3, 25])
def test_few_sentences_make_as_many_micro_batches_as_a_step_has(tmp_path: Path, rows: int) -> None:
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 1000}
    trainer = make_trainer(tmp_path, more={"train_dataset": TinyTask(rows)}, zo_rank=1, **options)
    result = trainer.find_learning_rate()
    assert result.groups == 16
    assert (
        result.forward_passes == forward_passes_of_search(400, 4) + 4 > 4
    )  # and whether the loss comes apart by rows
