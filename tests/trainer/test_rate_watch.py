"""A rate that was searched for and is too large: the losses of the run show it, and the rate is lowered."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.conftest import assert_same_bits, seeded, weights_of
from tests.trainer.runs import SaveAt, logged, make_trainer, trained
from zo_hf import ZOTrainer
from zo_hf.lr_finder.find import LRFinderResult
from zo_hf.lr_finder.loss_probes import LineProbe, LossProbes
from zo_hf.trainer import learning_rate as trainer_learning_rate
from zo_hf.trainer.rate_watch import divide_learning_rate

MESSAGE = "the rate of learning_rate='auto' is too large"
#: Only the first of the planned steps are taken: the search is made for all of them.
PLANNED, TAKEN = 220, 45
TOO_LARGE = 0.03
RUN = {"max_steps": PLANNED, "learning_rate": "auto", "zo_rank": 1, "zo_fold_steps": 20}


def qwen2() -> nn.Module:
    size = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "tie_word_embeddings": True}
    return Qwen2ForCausalLM(Qwen2Config(**size, **heads, initializer_range=0.2)).eval()


def few_facts() -> list[dict[str, torch.Tensor]]:
    """Four rows with an answer of two tokens, eight times each: batches hardly differ."""
    ids = torch.randint(3, 48, (4, 8), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :-2] = -100
    rows = zip(ids, labels, strict=True)
    return [{"input_ids": x, "labels": y, "attention_mask": torch.ones_like(x)} for x, y in rows] * 8


@pytest.fixture
def too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every search find a rate that is some twenty times too large."""
    lines = tuple(LineProbe(5.0, 0.1, loss, 0.5, 5.0) for loss in (4.0, 4.1, 4.2))
    found = LRFinderResult(TOO_LARGE, LossProbes(lines), 0, None, math.nan, ())
    monkeypatch.setattr(trainer_learning_rate, "find_learning_rate", lambda *args, **kwargs: found)


class Few(ZOTrainer):
    """Stops after `TAKEN` steps."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.control.should_training_stop = self.state.global_step + 1 >= TAKEN
        return super().training_step(*args, **kwargs)


def run(folder: Path, kind: type[ZOTrainer] = Few, **options: Any) -> Any:
    more = {"train_dataset": few_facts()} | options.pop("more", {})
    return trained(folder, seeded(qwen2), kind, more=more, **RUN | options)


def test_a_rate_that_is_too_large_is_lowered_and_said_to_be(
    tmp_path: Path, too_large: None, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = run(tmp_path)
    lowered = [record.message for record in caplog.records if MESSAGE in record.message]
    assert lowered and "before training), so the rate is divided by" in lowered[0]
    rates = logged(trainer, "learning_rate")
    first = TOO_LARGE
    assert rates[0] == first
    assert rates[-1] == pytest.approx(first / _divisor(trainer))
    # The last message says what to set.
    final = float(lowered[-1].split("set learning_rate=")[1].split()[0])
    assert final == pytest.approx(first / _divisor(trainer), rel=0.06)
    by_hand = run(tmp_path, learning_rate=first)
    assert max(logged(trainer, "loss")) < max(logged(by_hand, "loss"))


def _divisor(trainer: Any) -> float:
    return trainer._rate_watch.divisor


@pytest.mark.parametrize("only_trajectory", [False, True])
def test_a_resumed_run_continues_the_watch(tmp_path: Path, too_large: None, only_trajectory: bool) -> None:
    options = {"save_only_trajectory": only_trajectory}
    whole = run(tmp_path, more={"callbacks": [SaveAt(25)]}, **options)
    assert _divisor(whole) > 1
    resumed = run(tmp_path, resume=str(tmp_path / "checkpoint-25"), **options)
    assert _divisor(resumed) == _divisor(whole)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
    assert logged(resumed, "learning_rate") == logged(whole, "learning_rate")


def test_a_rate_that_was_given_is_not_watched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = run(tmp_path, learning_rate=0.05, lr_scheduler_type="constant")
    assert set(logged(trainer, "learning_rate")) == {0.05} and MESSAGE not in caplog.text
    assert trainer._rate_watch.watch is None


def test_a_second_training_starts_a_new_watch(tmp_path: Path, too_large: None) -> None:
    trainer = make_trainer(tmp_path, seeded(qwen2), Few, more={"train_dataset": few_facts()}, **RUN)
    trainer.train()
    assert trainer._rate_watch.divisor > 1
    trainer.args.learning_rate = 1e-4
    trainer.train()
    assert trainer._rate_watch.watch is None and trainer._rate_watch.divisor == 1


@pytest.mark.parametrize("kind", ["LambdaLR", "StepLR", "CosineAnnealingLR", "SequentialLR", "ReduceLROnPlateau"])
def test_every_later_rate_of_a_schedule_is_divided(kind: str) -> None:
    schedulers = torch.optim.lr_scheduler

    def rates(divisor: float) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        made = {
            "LambdaLR": lambda: schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
            "StepLR": lambda: schedulers.StepLR(optimizer, 3, 0.5),
            "CosineAnnealingLR": lambda: schedulers.CosineAnnealingLR(optimizer, 12),
            "SequentialLR": lambda: schedulers.SequentialLR(
                optimizer,
                [schedulers.LinearLR(optimizer, 0.5, 1.0, 4), schedulers.LambdaLR(optimizer, lambda s: 1 / (1 + s))],
                [4],
            ),
            "ReduceLROnPlateau": lambda: schedulers.ReduceLROnPlateau(optimizer, patience=1),
        }
        scheduler, seen = made[kind](), []
        for step in range(10):
            optimizer.step()
            if step == 2:
                divide_learning_rate(optimizer, scheduler, divisor)
            scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
            seen.append(optimizer.param_groups[0]["lr"])
        return seen

    plain, divided = rates(1.0), rates(4.0)
    assert divided[:2] == plain[:2]
    assert divided[2:] == pytest.approx([rate / 4 for rate in plain[2:]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "options"),
    [(42, {}), (1, {}), (2, {"zo_subspace": "full"}), (42, {"zo_num_directions": 4}), (1, {"optim": "adamw_torch"})],
)
def test_few_facts_end_below_where_they_began(tmp_path: Path, options: dict[str, Any], seed: int) -> None:
    trainer = run(tmp_path, ZOTrainer, max_steps=400, seed=seed, logging_steps=10, zo_fold_steps=50, **options)
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
