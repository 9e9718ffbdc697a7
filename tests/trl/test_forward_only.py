"""`forward_only` of TRL's trainers and of their subclasses: what the ready-made pairs have, and who is refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

import zo_hf.trl
from tests.conftest import assert_same_bits, weights_of
from tests.trl.test_by_rows import Watch
from tests.trl.toys import READY, config, folder_of
from zo_hf import ZOTrainer, forward_only
from zo_hf.trl.trainers import READY as MODULES
from zo_hf.trl.trainers import REFUSED

trl = pytest.importorskip("trl")


class Halved(trl.SFTTrainer):  # type: ignore[misc,name-defined]
    """Halves the loss; its class knows neither `return_outputs` nor keywords that Trainer does not pass."""

    def compute_loss(self, model: Any, inputs: dict, num_items_in_batch: Any = None) -> Any:
        assert model.config.vocab_size  # type: ignore[union-attr]
        return 0.5 * super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)


class Squared(trl.DPOTrainer):  # type: ignore[misc,name-defined]
    """Minimizes a function of the whole batch."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) ** 2


class Ranked(trl.DPOTrainer):  # type: ignore[misc,name-defined]
    """Adds nothing."""


class Rewarded(trl.GRPOTrainer):  # type: ignore[misc,name-defined]
    """Adds nothing."""


def run(kind: Any, name: str, folder: Path, tokenizer: Any, **options: Any) -> tuple[Any, Watch]:
    """Train for two steps; `kind` may be a subclass of the trainer of that name."""
    made, arguments = forward_only(kind, getattr(trl, f"{name}Config"))
    data, usual = READY[name]
    args = config(arguments, folder, **usual | options)
    trainer = made(folder_of(name, folder, tokenizer), args=args, train_dataset=data())
    watch = Watch(trainer)
    trainer.train()
    return trainer, watch


@pytest.mark.parametrize("name", MODULES)
def test_it_gives_the_ready_made_pair(name: str) -> None:
    module = importlib.import_module(MODULES[name].module)
    kind, arguments = (getattr(module, f"{name}{part}") for part in ("Trainer", "Config"))
    pair = tuple(getattr(zo_hf.trl, f"ZO{name}{part}") for part in ("Trainer", "Config"))
    assert forward_only(kind, arguments) == pair
    assert forward_only(*pair) == pair  # type: ignore[arg-type]


def test_a_subclass_has_a_direction_for_every_row_and_its_own_loss(tmp_path: Path, tokenizer: Any) -> None:
    whole, watch = run(trl.SFTTrainer, "SFT", tmp_path, tokenizer, learning_rate=1e-3)
    assert watch.comes_apart and watch.groups == 4
    halved, watch = run(Halved, "SFT", tmp_path, tokenizer, learning_rate=2e-3)
    assert type(halved).__name__ == "ZOHalved" and watch.comes_apart and watch.groups == 4
    assert_same_bits(weights_of(whole.model), weights_of(halved.model))
    losses = [trainer.state.log_history[0]["loss"] for trainer in (whole, halved)]
    assert losses[1] == pytest.approx(losses[0] / 2)


def test_pairs_of_a_subclass_share_a_direction(tmp_path: Path, tokenizer: Any) -> None:
    _, watch = run(Ranked, "DPO", tmp_path, tokenizer)
    assert watch.comes_apart and watch.groups == 4
    _, watch = run(Squared, "DPO", tmp_path, tokenizer)
    assert watch.comes_apart is False


@pytest.mark.parametrize(
    ("home", "kind", "instead"),
    [
        ("trl", "GRPO", "zo_hf.rewards.EvolutionTrainer"),
        ("trl", "RLOO", "zo_hf.rewards.EvolutionTrainer"),
        ("trl.experimental.online_dpo", "OnlineDPO", "zo_hf.rewards.EvolutionTrainer"),
        ("trl.experimental.gkd", "GKD", "ZOSFTTrainer"),
    ],
)
def test_trainers_that_generate_are_refused_in_a_sentence(home: str, kind: str, instead: str) -> None:
    module = importlib.import_module(home)
    trainer, arguments = (getattr(module, f"{kind}{part}") for part in ("Trainer", "Config"))
    assert kind in REFUSED
    made, _ = forward_only(trainer, arguments)
    with pytest.raises(ValueError, match=rf"^trainer={kind}Trainer .*{instead}[^.]*\.$"):
        made("model", args=None)


def test_so_are_subclasses_of_theirs() -> None:
    made, _ = forward_only(Rewarded, trl.GRPOConfig)
    with pytest.raises(
        ValueError, match=r"^trainer=Rewarded .* TRL's GRPOTrainer .*zo_hf\.rewards\.EvolutionTrainer[^.]*\.$"
    ):
        made()


def test_every_stable_trainer_of_trl_is_in_a_table() -> None:
    kinds = {name.removesuffix("Trainer") for name in dir(trl) if name.endswith("Trainer")}
    assert kinds and kinds <= {*MODULES, *REFUSED}


def test_another_trainer_knows_nothing_of_trl() -> None:
    from transformers import Trainer, TrainingArguments

    kind, _ = forward_only(Trainer, TrainingArguments)
    assert kind.__mro__[1] is ZOTrainer
