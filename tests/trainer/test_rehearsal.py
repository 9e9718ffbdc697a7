"""What a training would refuse is refused before other work is done, and the rehearsal leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import assert_same_bits, seeded, tiny_opt, weights_of
from tests.trainer.runs import make_trainer, trained
from zo_hf.trainer.finite_weights import WeightsNotFinite
from zo_hf.trainer.rehearsal import rehearse


@pytest.mark.parametrize(
    "options",
    [{}, {"zo_subspace": "full"}, {"learning_rate": "auto"}, {"optim": "adamw_torch"}, {"zo_max_forward_passes": 10}],
    ids=str,
)
def test_a_rehearsed_training_is_the_training(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = trained(tmp_path / "plain", **options)
    trainer = make_trainer(tmp_path / "rehearsed", **options)
    before, state = weights_of(trainer.model), torch.get_rng_state()
    rehearse(trainer)
    assert_same_bits(weights_of(trainer.model), before)
    assert torch.equal(torch.get_rng_state(), state) and trainer.zo is None
    trainer.train()
    assert_same_bits(weights_of(trainer.model), weights_of(expected.model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": "auto", "optim": "adagrad"}, "learning_rate='auto'"),
        ({"zo_rule": "conservative", "optim": "adamw_torch"}, "zo_rule='conservative'"),
        ({"zo_max_forward_passes": 1}, "zo_max_forward_passes=1"),
        ({"lr_scheduler_kwargs": {"no_such": 1}, "lr_scheduler_type": "cosine"}, "lr_scheduler_kwargs"),
    ],
)
def test_a_rehearsal_refuses_what_training_would(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    trainer = make_trainer(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        rehearse(trainer)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="zo_rank"):
        rehearse(make_trainer(tmp_path, zo_rank=2), True)
    rehearse(make_trainer(tmp_path), "True")


@pytest.mark.parametrize("between_folds", [True, False])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, between_folds: bool) -> None:
    trainer = make_trainer(tmp_path, seeded(tiny_opt), zo_subspace="full")
    if between_folds:
        trainer.train()
    with torch.no_grad():
        next(trainer.model.parameters()).view(-1)[3] = float("nan")
    with pytest.raises(WeightsNotFinite, match="learning_rate"):
        trainer.save_model(tmp_path / "saved")
    assert not list(tmp_path.glob("saved/*.safetensors"))
