"""What a training would refuse is refused before other work is done, and the rehearsal leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.conftest import assert_same_bits, seeded, tiny_opt, weights_of
from tests.quantization.runs import trainer_for, write_base
from tests.trainer.runs import make_trainer, trained
from zo_hf.trainer.finite_weights import WeightsNotFinite
from zo_hf.trainer.rehearsal import rehearse


@pytest.mark.parametrize(
    "options",
    [{}, {"zo_subspace": "full"}, {"learning_rate": "auto"}, {"optim": "adamw_torch"}, {"zo_max_forward_passes": 13}],
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
    for options, named in (({"optim": "adamw_torch"}, "optim"), ({"weight_decay": 0.5}, "weight_decay")):
        with pytest.raises(ValueError, match=f"was written with {named}="):
            rehearse(make_trainer(tmp_path, **options), True)
    rehearse(make_trainer(tmp_path), "True")


def test_factors_that_are_not_finite_are_not_saved_as_an_adapter(tmp_path: Path) -> None:
    class Breaks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert trainer.zo is not None
            with torch.no_grad():
                next(iter(trainer.zo.subspace.coordinates.values())).fill_(torch.nan)

    options = {"save_strategy": "steps", "save_steps": 1, "more": {"callbacks": [Breaks()]}}
    trainer = trainer_for(tmp_path / "out", "factors", write_base(tmp_path / "base"), "int8", **options)
    with pytest.raises(WeightsNotFinite):
        trainer.train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


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
