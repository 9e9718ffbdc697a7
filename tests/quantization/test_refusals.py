"""What cannot work with a quantized model says so before training, in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.conftest import seeded, tiny_bert, tiny_llama
from tests.quantization.test_probes import opaque_model
from tests.quantized_models import FORMATS, quantize
from tests.trainer.runs import make_trainer
from tests.trainer.test_refusals import refused, trains
from zo_hf import ZerothOrder, ZOTrainer


def quantized() -> nn.Module:
    model = quantize(seeded(tiny_llama))
    model.is_quantized, model.hf_quantizer = True, None  # as transformers marks what it has loaded
    return model


def opaque() -> nn.Module:
    model = opaque_model()
    model.is_quantized, model.hf_quantizer = True, None
    return model


def on_two_devices() -> nn.Module:
    model = quantized()

    class Elsewhere(nn.Parameter):
        """Says that it is on a GPU."""

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda", 0)

    weight = model.lm_head.weight
    model.lm_head._parameters["weight"] = weight.data.as_subclass(Elsewhere)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("with_adapter", [False, True], ids=["layers", "below an adapter"])
def test_an_engine_refuses_graphs_of_quantized_layers_by_itself(with_adapter: bool) -> None:
    model = quantize(seeded(tiny_llama))
    if with_adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    refusal = r"^zo_cuda_graph=True does not combine with a quantized model: .*; use zo_cuda_graph=False\.$"
    with pytest.raises(ValueError, match=refusal):
        ZerothOrder(model, cuda_graph=True, batched_probes=True)


@pytest.mark.parametrize("kind", FORMATS)
def test_offloaded_codes_are_refused_though_nobody_can_read_them(tmp_path: Path, kind: str) -> None:
    model = quantize(seeded(tiny_llama), kind)
    model.is_quantized = True
    cpu_offload(model, execution_device=torch.device("cpu"))
    refusal = r"^a quantized model does not combine with weights that device_map offloads: .*"
    with pytest.raises(ValueError, match=refusal):
        ZerothOrder(model)
    with pytest.raises(ValueError, match=refusal):
        make_trainer(tmp_path, model)


@pytest.mark.parametrize("kind", FORMATS)
def test_offloaded_codes_are_refused_without_a_word_from_transformers(kind: str) -> None:
    model = quantize(seeded(tiny_llama), kind)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"is quantized, and device_map offloads it; give device_map one device"):
        ZerothOrder(model)


WRONG: dict[str, tuple[str, Callable[[], nn.Module], dict[str, Any]]] = {
    "all weights": ("zo_subspace='full'", quantized, {"zo_subspace": "full"}),
    "folds into what cannot be written": ("zo_fold_steps=5", opaque, {"zo_fold_steps": 5}),
    "a core that folds there": ("zo_fold_steps=5", opaque, {"zo_subspace": "core", "zo_fold_steps": 5, "zo_rank": 4}),
    "scales that cannot be written": ("zo_subspace='scales'", opaque, {"zo_subspace": "scales"}),
    "norms in an adapter": (
        "zo_target_modules",
        quantized,
        {"zo_fold_steps": 0, "zo_target_modules": ["q_proj", "norm"]},
    ),
    "compilation": ("torch_compile", quantized, {"torch_compile": True}),
    "shards": ("fsdp", quantized, {"fsdp": "full_shard"}),
    "two kinds of devices": ("device_map", on_two_devices, {}),
    "a rank above the width": ("zo_rank=64", quantized, {"zo_rank": 64}),
}


@pytest.mark.parametrize("name", WRONG)
def test_it_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def no_step(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("training has begun")

    monkeypatch.setattr(ZOTrainer, "training_step", no_step)
    argument, model, options = WRONG[name]
    refused(argument, lambda: trains(make_trainer(tmp_path, model(), **{"zo_fold_steps": None} | options)))
    assert list(tmp_path.iterdir()) == []


def test_without_peft_factors_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would end as an adapter; with folds none is needed."""
    monkeypatch.setattr("zo_hf.subspaces.lora.is_peft_available", lambda: False)
    refused("zo_fold_steps=0", lambda: make_trainer(tmp_path, quantized(), zo_fold_steps=None))
    make_trainer(tmp_path, quantized(), zo_fold_steps=5)


def test_a_model_quantized_without_transformers_trains_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quantize(seeded(tiny_llama)), zo_fold_steps=2, max_steps=3, learning_rate=1e-3)
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_new_head_does_not_vanish_from_an_adapter(tmp_path: Path) -> None:
    """An adapter holds factors of the head and not the head itself, which another run would draw anew."""
    model = quantize(seeded(tiny_bert))
    model.is_quantized, model.hf_quantizer = True, None
    model.classifier = nn.Linear(32, 2)
    with pytest.raises(ValueError, match=r"classifier.*zo_fold_steps=50"):
        make_trainer(tmp_path, model, zo_fold_steps=0).train()


def test_a_second_training_says_that_there_is_an_adapter_now(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quantized(), zo_subspace="low_rank", zo_fold_steps=0, max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match=r"zo_subspace='adapter'"):
        make_trainer(tmp_path, trainer.model, zo_subspace="low_rank")


def test_an_adapter_without_its_run_is_not_resumed_as_nothing(tmp_path: Path) -> None:
    """save_only_model keeps the adapter, and no coordinates to go on from."""
    options = {"zo_fold_steps": 0, "max_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    make_trainer(tmp_path, quantized(), **options).train()
    with pytest.raises(ValueError, match=r"is_trainable=True"):
        make_trainer(tmp_path, quantized(), zo_fold_steps=0, max_steps=4).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_an_unknown_way_of_quantizing_is_not_taken_for_none(tmp_path: Path) -> None:
    model = seeded(tiny_llama)
    model.is_quantized, model.hf_quantizer = True, None
    with pytest.raises(ValueError, match=r"peft.get_peft_model"):
        make_trainer(tmp_path, model)
