"""`learning_rate="auto"` in a training: nothing of the search is left behind but the rate and the count of its passes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import default_data_collator

from tests.conftest import TinyTask, assert_same_bits, weights_of
from tests.trainer.runs import SaveAt, config, logged, make_trainer, trained
from zo_hf import ZOTrainer
from zo_hf.lr_finder.find import forward_passes_of_search
from zo_hf.trainer import learning_rate as trainer_learning_rate
from zo_hf.trainer.learning_rate import schedule_of

#: Only a few of the planned steps are taken: what is searched for is the rate of all of them.
PLANNED, TAKEN = 220, 4
RUN = {"max_steps": PLANNED, "zo_rank": 1, "lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.01}


class Restless(TinyTask):
    """Data that uses every global random generator."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        random.random(), np.random.rand(), torch.rand(1)
        return super().__getitem__(index)


class Few(ZOTrainer):
    """Stops after `TAKEN` steps."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.control.should_training_stop = self.state.global_step + 1 >= TAKEN
        return super().training_step(*args, **kwargs)


def randomness() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zo_subspace": "full", "zo_direction": "sparse"},
        {"zo_normalize": True, "optim": "adamw_torch", "zo_direction": "layers", "gradient_accumulation_steps": 2},
        {"zo_estimator": "one_sided", "zo_num_directions": 2, "optim_args": "momentum=0.9"},
    ],
    ids=["plain", "full", "adam", "one-sided"],
)
def test_the_run_is_the_one_with_the_found_rate_given_by_hand(tmp_path: Path, options: dict[str, Any]) -> None:
    options = RUN | options
    more = {"train_dataset": Restless()}
    auto = trained(tmp_path / "auto", kind=Few, more=more, learning_rate="auto", **options)
    after = randomness()
    result = auto.found_learning_rate
    assert result is not None and result.prediction
    by_hand = trained(tmp_path / "hand", kind=Few, more=more, learning_rate=result.learning_rate, **options)
    assert_same_bits(weights_of(auto.model), weights_of(by_hand.model))
    assert randomness() == after
    for key in ("loss", "learning_rate", "zo/projected_grad"):
        assert logged(auto, key) == logged(by_hand, key)
    passes = zip(logged(auto, "zo/forward_passes"), logged(by_hand, "zo/forward_passes"), strict=True)
    # The first step of a run by hand finds out whether its rows come apart.
    assert {a - b for a, b in passes} == {result.forward_passes - (3 if result.groups > 1 else 0)}
    assert auto.args.learning_rate == "auto" and by_hand.found_learning_rate is None


def test_it_takes_at_most_five_percent_and_they_count(tmp_path: Path) -> None:
    options = {"zo_rank": 1, "zo_max_forward_passes": 410, "zo_batched_probes": False, "lr_scheduler_type": "linear"}
    options |= {"max_steps": -1, "logging_steps": 100, "per_device_train_batch_size": 2, "zo_num_directions": 4}
    trainer = trained(tmp_path, learning_rate="auto", more={"train_dataset": TinyTask(400)}, **options)
    result = trainer.found_learning_rate
    assert result.groups == 2
    assert result.forward_passes == forward_passes_of_search(20, 1) + 4 == 24
    assert trainer.state.global_step == (410 - 24) // 8
    # The schedule ends where the passes do.
    assert trainer.lr_scheduler.get_last_lr()[0] == 0


def test_too_few_passes_fall_back_to_the_default_in_one_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trained(tmp_path, learning_rate="auto", max_steps=3)
    assert set(logged(trainer, "learning_rate")) == {1e-5}
    assert [r.message for r in caplog.records if r.levelname == "WARNING" and "not sure" in r.message] == [
        "learning_rate='auto' is not sure: 0 forward passes are too few to find a learning rate, which takes at least 20; "
        "the default is used."
    ]


@pytest.mark.parametrize("only_trajectory", [False, True])
def test_a_resumed_run_does_not_search_again(
    tmp_path: Path, only_trajectory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RUN | {"save_only_trajectory": only_trajectory, "zo_fold_steps": 2}
    callbacks = {"callbacks": [SaveAt(3)]}
    whole = trained(tmp_path, kind=Few, more=callbacks, learning_rate="auto", **options)
    monkeypatch.setattr(trainer_learning_rate, "find_learning_rate", None)
    resumed = trained(tmp_path, kind=Few, resume=str(tmp_path / "checkpoint-3"), learning_rate="auto", **options)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
    assert logged(resumed, "learning_rate") == logged(whole, "learning_rate")
    assert logged(resumed, "zo/forward_passes") == logged(whole, "zo/forward_passes")


def test_a_run_whose_rate_was_given_is_not_resumed_with_auto(tmp_path: Path) -> None:
    trained(tmp_path, more={"callbacks": [SaveAt(3)]}, learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"checkpoint-3 is of a run whose learning_rate was not 'auto'; .*\.$"):
        trained(tmp_path, resume=str(tmp_path / "checkpoint-3"), learning_rate="auto")


def test_searching_alone_trains_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, learning_rate=0.5, **RUN)
    before = {name: weight.clone() for name, weight in weights_of(trainer.model).items()}
    result = trainer.find_learning_rate()
    assert result.prediction and trainer.zo is None and trainer.args.learning_rate == 0.5
    assert_same_bits(weights_of(trainer.model), before)
    auto = trained(tmp_path, kind=Few, learning_rate="auto", **RUN)
    assert auto.found_learning_rate.probes == result.probes
    assert auto.found_learning_rate.learning_rate == result.learning_rate


def test_a_schedule_that_decays_leaves_room_for_a_larger_rate(tmp_path: Path) -> None:
    constant = make_trainer(tmp_path, **RUN | {"lr_scheduler_type": "constant"})
    linear = make_trainer(tmp_path, **RUN | {"warmup_steps": 0})
    assert set(schedule_of(constant.args, PLANNED, PLANNED, 1e-5)) == {(1.0, 1.0)}
    schedule = schedule_of(linear.args, PLANNED, PLANNED, 1e-5)
    assert schedule == sorted(schedule, reverse=True)
    assert np.mean(schedule, axis=0) == pytest.approx([1 / 2, 1 / 3], abs=0.01)
    assert np.mean(schedule_of(linear.args, PLANNED, PLANNED // 2, 1e-5), axis=0) == pytest.approx(
        [3 / 4, 7 / 12], abs=0.01
    )
    assert linear.find_learning_rate().learning_rate > constant.find_learning_rate().learning_rate


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"max_grad_norm": 1.0}, {}, "max_grad_norm=1.0: .*clipped steps are; use max_grad_norm=0, or give a number"),
        ({"optim": "adagrad"}, {}, "steps of Adagrad are; use optim='sgd'"),
        ({"zo_rule": "muon", "zo_num_directions": 2}, {}, "does not combine with zo_rule='muon'"),
        ({"zo_estimator": "fzoo", "zo_num_directions": 2}, {}, "does not combine with zo_estimator='fzoo'"),
    ],
)
def test_what_cannot_be_found_is_refused_before_any_pass(
    tmp_path: Path, options: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^learning_rate='auto' .*{message}.*\\.$"):
        trained(tmp_path, learning_rate="auto", more=more, **options)


def test_data_without_a_length_is_refused(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter([TinyTask()[i] for i in range(64)])

    more = {"train_dataset": Stream(), "data_collator": default_data_collator}
    with pytest.raises(ValueError, match=r"^learning_rate='auto' draws batches .* has no length; give a number\.$"):
        trained(tmp_path, learning_rate="auto", more=more)


def test_what_a_learning_rate_can_be(tmp_path: Path) -> None:
    assert config(tmp_path, learning_rate="1e-5").learning_rate == 1e-5
    assert config(tmp_path, learning_rate="auto").learning_rate == "auto"
    with pytest.raises(ValueError, match=r"^learning_rate='fast' is not a number; give one, or 'auto'\.$"):
        config(tmp_path, learning_rate="fast")


# Directions for rows.


class OwnLoss(ZOTrainer):
    """Computes its loss in a way that the engine cannot take apart."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs) * 1.0


def test_directions_for_rows_are_found_a_larger_rate(tmp_path: Path) -> None:
    options = RUN | {"gradient_accumulation_steps": 2, "max_steps": 400, "zo_direction": "gaussian"}
    one = make_trainer(tmp_path, zo_rows_per_direction=0, **options).find_learning_rate()
    many = make_trainer(tmp_path, **options).find_learning_rate()
    assert (one.groups, many.groups) == (1, 16)
    assert many.forward_passes == one.forward_passes + 4
    assert one.probes.curvature == pytest.approx(many.probes.curvature, rel=1e-3)
    assert many.learning_rate > 1.5 * one.learning_rate


def test_a_loss_that_stays_whole_gets_the_rate_of_one_direction(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = RUN | {"zo_direction": "gaussian"}
    one, many = (
        make_trainer(tmp_path, kind=OwnLoss, zo_rows_per_direction=rows, **options).find_learning_rate()
        for rows in (0, 1)
    )
    assert many.groups == 1 and many.learning_rate == one.learning_rate
    assert "all rows of a step share its directions" in caplog.text


def test_how_a_step_is_divided_does_not_matter_to_what_rows_tell(tmp_path: Path) -> None:
    whole, parts = (
        make_trainer(
            tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=8 // rows, **RUN
        ).find_learning_rate()
        for rows in (8, 4)
    )
    assert whole.groups == parts.groups == 8
    assert whole.probes.noise_square == pytest.approx(parts.probes.noise_square, rel=1e-3)
    assert whole.probes.gradient_square == pytest.approx(parts.probes.gradient_square, rel=1e-3)
    assert whole.learning_rate == pytest.approx(parts.learning_rate, rel=0.07)  # a step of the candidates
