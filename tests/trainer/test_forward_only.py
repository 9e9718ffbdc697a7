"""Other Trainer subclasses, made forward-only: what the subclass does happens, and its super() calls reach ours."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

from tests.conftest import TinyTask, assert_same_bits, seeded, tiny_opt, weights_of
from tests.trainer.runs import config, logged, trained
from zo_hf import ZOConfig, ZOSeq2SeqTrainer, ZOTrainer, forward_only
from zo_hf.trainer.forward_only import ABOUT_GRADIENTS


@dataclass
class TheirConfig(TrainingArguments):
    """Arguments with an option of their own, and defaults about gradients."""

    learning_rate: float = field(default=2e-5, metadata={"help": "theirs"})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "theirs"})
    logging_steps: float = field(default=7, metadata={"help": "theirs"})
    packing: bool = field(default=False, metadata={"help": "theirs"})

    def __post_init__(self) -> None:
        self.checked = True
        super().__post_init__()


class Theirs(Trainer):
    """A Trainer that notes what happens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.events: list[str] = []
        super().__init__(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        self.events.append("step")
        inputs["input_ids"] = inputs["input_ids"].roll(1, 1)
        return super().training_step(model, inputs, num_items_in_batch)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        self.events.append("optimizer")
        return super().create_optimizer(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs | {"theirs": 1.0}, *args, **kwargs)


def test_the_subclass_acts_and_the_step_is_forward_only(tmp_path: Path) -> None:
    ZOTheirs, ZOTheirConfig = forward_only(Theirs, TheirConfig)
    model = seeded(tiny_opt)
    before = weights_of(model)
    args = config(tmp_path, ZOTheirConfig, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    trainer = ZOTheirs(model, args, train_dataset=TinyTask())
    trainer.train()
    assert trainer.events == ["optimizer"] + ["step"] * 8  # 4 steps of 2 micro-batches
    assert len(logged(trainer, "theirs")) and len(logged(trainer, "zo/forward_passes")) == 4
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())


def test_the_batch_that_the_subclass_changed_is_the_one_that_is_probed(tmp_path: Path) -> None:
    class Rolled(TinyTask):
        def __getitem__(self, index: int) -> dict:
            row = super().__getitem__(index)
            return row | {"input_ids": row["input_ids"].roll(1, 0)}

    ZOTheirs, _ = forward_only(Theirs, TrainingArguments)
    trainer = ZOTheirs(seeded(tiny_opt), config(tmp_path), train_dataset=TinyTask())
    trainer.train()
    reference = trained(tmp_path, more={"train_dataset": Rolled()})
    assert_same_bits(weights_of(trainer.model), weights_of(reference.model))


def test_zo_trainer_stands_under_the_subclass() -> None:
    ZOTheirs, _ = forward_only(Theirs, TheirConfig)
    order = ZOTheirs.__mro__
    assert order.index(Theirs) < order.index(ZOTrainer) < order.index(Trainer)
    assert ZOTheirs.__name__ == "ZOTheirs"
    for kind in (Seq2SeqTrainer, ZOSeq2SeqTrainer):
        made, _ = forward_only(kind, TrainingArguments)
        assert issubclass(made, Seq2SeqTrainer) and issubclass(made, ZOTrainer)


def test_the_config_has_their_defaults_except_about_gradients(tmp_path: Path) -> None:
    _, ZOTheirConfig = forward_only(Theirs, TheirConfig)
    made, ours = ZOTheirConfig(str(tmp_path), use_cpu=True), ZOConfig(str(tmp_path), use_cpu=True)
    for name in (*ABOUT_GRADIENTS, "zo_eps", "zo_rank"):
        if hasattr(ours, name):
            assert getattr(made, name) == getattr(ours, name), name
    assert (made.logging_steps, made.packing, made.checked) == (7, False, True)
    assert {option.name for option in fields(made)} >= {option.name for option in fields(ZOConfig)} | {"packing"}


def test_what_is_forward_only_already_stays_as_it_is() -> None:
    assert forward_only(ZOTrainer, ZOConfig) == (ZOTrainer, ZOConfig)
    assert forward_only(Trainer, TrainingArguments)[1] is ZOConfig


@pytest.mark.parametrize(
    ("trainer", "arguments", "name"), [(object, TrainingArguments, "trainer"), (Trainer, dict, "config")]
)
def test_other_classes_are_refused(trainer: Any, arguments: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}=.* is not a subclass of transformers\.Train"):
        forward_only(trainer, arguments)


def test_the_old_mixin_still_works_and_says_what_to_use() -> None:
    import zo_hf

    with pytest.warns(FutureWarning, match="forward_only"):
        mixin = zo_hf.ZOTrainerMixin
    assert mixin is ZOTrainer

    class ZOTheirs(mixin, Theirs):  # type: ignore[misc,valid-type]
        pass

    assert ZOTheirs.__mro__.index(ZOTrainer) < ZOTheirs.__mro__.index(Theirs)
