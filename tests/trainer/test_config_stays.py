"""A validated `ZOConfig` is never written: what a training resolves is in records of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.runs import config, make_trainer
from zo_hf import ZOConfig
from zo_hf.stability.monitor import StabilityCallback


def values(args: ZOConfig) -> dict[str, Any]:
    return copy.deepcopy({name: getattr(args, name) for name in ZOConfig.__dataclass_fields__ if hasattr(args, name)})


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": None},
        {"learning_rate": "auto", "max_steps": 500, "zo_max_forward_passes": 60},
        {"max_steps": -1, "zo_max_forward_passes": 12},
        {"zo_eps": "auto", "zo_subspace": "auto", "zo_rank": None, "zo_fold_steps": None},
        {"zo_rule": "hizoo", "zo_estimator": "second_difference"},
    ],
    ids=str,
)
def test_training_leaves_the_arguments_as_they_are(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, more={"callbacks": [StabilityCallback(2)]}, **options)
    before = values(trainer.args)
    assert before["zo_stability_steps"] == 0
    trainer.train()
    assert values(trainer.args) == before
    assert trainer.state.global_step > 0


def test_a_search_alone_leaves_them_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=500, zo_max_forward_passes=1000)
    before = values(trainer.args)
    assert trainer.find_learning_rate().learning_rate > 0
    assert values(trainer.args) == before


def test_the_steps_that_a_budget_pays_for_are_not_written_for_a_dataset_without_a_length(tmp_path: Path) -> None:
    import datasets

    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 200
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    trainer = make_trainer(tmp_path, more={"train_dataset": stream}, max_steps=-1, zo_max_forward_passes=12)
    trainer.train()
    assert trainer.args.max_steps == -1 and 0 < trainer.state.global_step <= 6


def test_a_config_is_equal_to_another_of_the_same_options(tmp_path: Path) -> None:
    assert config(tmp_path).settings() == config(tmp_path).settings()
