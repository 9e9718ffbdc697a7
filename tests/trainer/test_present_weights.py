"""Whoever looks at the model during training sees the weights of now: W + B·Vᵀ, as the next fold would write it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from tests.conftest import (
    TinyTask,
    assert_same_bits,
    seeded,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_opt,
    weights_of,
)
from tests.quantized_models import quantize
from tests.trainer.runs import At, make_trainer, trained, with_lora
from zo_hf import ZerothOrder

RUN = {"zo_fold_steps": 4, "learning_rate": 1e-3, "weight_decay": 0.1}
MODELS = {"opt, tied": tiny_opt, "llama": tiny_llama, "gpt2, tied and transposed": tiny_gpt2, "mixtral": tiny_mixtral}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "subspace", ["low_rank", *(pytest.param(name, marks=pytest.mark.slow) for name in ("core", "norms"))]
)
def test_a_state_dict_has_the_bits_of_a_run_that_ends_there(tmp_path: Path, build: Any, subspace: str) -> None:
    options = RUN | {"zo_subspace": subspace, "zo_rank": 3 if subspace in ("low_rank", "core") else None}
    options["zo_fold_steps"] = None if options["zo_rank"] is None else 4
    looks = At({3, 4}, lambda state, model, **_: copy.deepcopy(model.state_dict()))
    trained(tmp_path, seeded(build), more={"callbacks": [looks]}, max_steps=5, **options)
    for step, seen in zip((3, 4), looks.results, strict=True):
        ends = trained(tmp_path, seeded(build), max_steps=step, **options)
        assert_same_bits(seen, weights_of(ends.model))


def test_half_precision_and_adapters_have_them_too(tmp_path: Path) -> None:
    for made in (lambda: seeded(tiny_opt, torch.bfloat16), lambda: with_lora(seeded(tiny_opt, torch.bfloat16))):
        looks = At({3}, lambda state, model, **_: copy.deepcopy(model.state_dict()))
        options = RUN | {"zo_subspace": "low_rank", "zo_rank": 1}
        trained(tmp_path, made(), more={"callbacks": [looks]}, max_steps=5, **options)
        assert_same_bits(looks.results[0], weights_of(trained(tmp_path, made(), max_steps=3, **options).model))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_model_that_folds_has_them(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model, batch = quantize(seeded(tiny_opt), kind), torch.arange(8).view(1, 8)
    zo = ZerothOrder(model, "low_rank", fold_steps=50, seed=0)
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1e-2))
    zo.estimate(lambda: model(input_ids=batch, labels=batch).loss)
    optimizer.step()
    seen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    zo.finish()
    assert_same_bits(seen, dict(model.state_dict()))


def test_a_quantized_model_without_folds_says_that_it_gives_its_base(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("bitsandbytes")
    zo = ZerothOrder(quantize(seeded(tiny_opt)), "low_rank", seed=0)
    with caplog.at_level(logging.WARNING, "zo_hf"):
        zo.model.state_dict()
        zo.model.state_dict()
    (said,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "save it with trainer.save_model()" in said


def test_every_way_to_a_state_dict_gives_them() -> None:
    """Of a part of the model, with parameters kept, of a deep copy; and none of them after the engine has ended."""
    model: Any = seeded(tiny_opt)
    batch = torch.arange(8).view(1, 8)
    zo = ZerothOrder(model, "low_rank", seed=0)
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1e-2))
    raw = weights_of(model)
    assert_same_bits(model.state_dict(), raw)
    zo.estimate(lambda: model(input_ids=batch, labels=batch).loss)
    optimizer.step()
    copied = copy.deepcopy(model)
    seen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert seen["lm_head.weight"].equal(seen["model.decoder.embed_tokens.weight"])
    live = model.state_dict()
    assert live["lm_head.weight"].data_ptr() == live["model.decoder.embed_tokens.weight"].data_ptr()
    assert model.model.decoder.layers[0].state_dict()["fc1.weight"].equal(seen["model.decoder.layers.0.fc1.weight"])
    assert model.state_dict(keep_vars=True)["lm_head.weight"] is model.lm_head.weight
    folded = zo.folded_state_dict()
    assert folded is not None
    assert_same_bits(folded, seen)
    assert_same_bits(copied.state_dict(), seen)
    assert_same_bits(weights_of(model), raw)
    zo.finish()
    assert_same_bits(weights_of(model), seen)
    assert model.state_dict()["lm_head.weight"].data_ptr() == model.lm_head.weight.data_ptr()
    assert not any(module._state_dict_hooks for module in model.modules())


class Uploads(TrainerCallback):
    """Saves the model as integrations with trackers do, when training ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.averaged = {name: p.detach().clone() for name, p in copy.deepcopy(model).named_parameters()}
        model.save_pretrained(self.folder)


@pytest.mark.parametrize("first", [True, False], ids=["before all others", "after all others"])
def test_parameters_are_final_when_training_has_ended(tmp_path: Path, first: bool) -> None:
    model, uploads = seeded(tiny_opt), Uploads(tmp_path / "uploaded")
    trainer = make_trainer(tmp_path, model, max_steps=6, **RUN)
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0 if first else len(callbacks), uploads)
    trainer.train()
    final = {name: p.detach() for name, p in model.named_parameters()}
    assert_same_bits(uploads.seen, final)
    assert_same_bits(uploads.averaged, final)
    loaded = type(model).from_pretrained(tmp_path / "uploaded")
    assert_same_bits(weights_of(loaded), weights_of(model))
    assert uploads in trainer.callback_handler.callbacks
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.callback_handler.callbacks == before


def test_factors_are_an_adapter_when_training_has_ended(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    kinds = []

    class Looks(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            kinds.append(model)

    trainer = trained(tmp_path, quantize(seeded(tiny_opt)), more={"callbacks": [Looks()]}, zo_fold_steps=0)
    assert kinds == [trainer.model] and type(trainer.model).__name__.startswith("Peft")


def test_metrics_and_save_pretrained_see_them(tmp_path: Path) -> None:
    model: Any = seeded(tiny_opt)
    losses: list[float] = []

    def loss_of(plain: nn.Module) -> float:
        rows = [TinyTask()[i] for i in range(16)]
        with torch.no_grad():
            return float(plain(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss)

    def metrics(_: Any) -> dict[str, float]:
        model.save_pretrained(tmp_path / "seen")
        losses.append(loss_of(type(model).from_pretrained(tmp_path / "seen").eval()) - loss_of(model))
        return {}

    # Without weight decay, which the weights owe until the next fold.
    options = {"zo_fold_steps": 4, "learning_rate": 1e-2, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    untrained = loss_of(model)
    trained(tmp_path, model, more={"compute_metrics": metrics}, **options)
    assert len(losses) == 1 and abs(losses[0]) < 1e-5 < abs(untrained - loss_of(model)) / 10


@pytest.mark.parametrize("writes", [False, True])
def test_a_callback_that_writes_weights_is_told_once(
    writes: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Between folds it would clip the weights of the last one, and the log would not hold it."""

    def clip(state: Any, model: nn.Module, **_: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters() if writes else ():
                parameter.clamp_(-0.1, 0.1)

    with caplog.at_level(logging.WARNING, "zo_hf"):
        trained(tmp_path, more={"callbacks": [At(None, clip)]}, **RUN, eval_strategy="steps", eval_steps=1)
    assert sum("was written between two steps" in message for message in caplog.messages) == writes
