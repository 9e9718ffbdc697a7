"""What does not work with offloaded weights says so, in one sentence, before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.conftest import tiny_opt
from tests.offload.models import on_disk, saved
from tests.offload.test_training import lora
from tests.trainer.runs import make_trainer, trained
from zo_hf import ZerothOrder
from zo_hf.offload import get_peft_model
from zo_hf.offload.weight import _in_file


def without_folder(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, device_map={"": "disk"})


def half_tied(base: Path) -> Any:
    everything = {"model.decoder.embed_tokens": "cpu", "model.decoder.embed_positions": "cpu"}
    everything |= {"model.decoder.layers": "cpu", "model.decoder.final_layer_norm": "cpu", "lm_head": "disk"}
    return on_disk(base, everything)


def with_a_new_head(base: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        base, device_map={"": "disk"}, offload_folder=base.parent / "offload", num_labels=2
    )


def with_adapter(kind: type[peft.PeftConfig] = peft.LoraConfig, **options: Any) -> Callable[[Path], Any]:
    return lambda base: get_peft_model(on_disk(base), kind(task_type="CAUSAL_LM", **options))


def a_subspace_that_writes(base: Path) -> None:
    ZerothOrder(on_disk(base), "full")


REFUSED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "full": ("zo_subspace='full'", lambda base: make_trainer(base.parent / "run", on_disk(base), zo_subspace="full")),
    "full, of an engine": ("zo_subspace='full'", a_subspace_that_writes),
    "a compiled model": (
        "torch_compile",
        lambda base: make_trainer(base.parent / "run", on_disk(base), torch_compile=True),
    ),
    "a model that the user has compiled": (
        "torch.compile",
        lambda base: make_trainer(base.parent / "run", torch.compile(on_disk(base))),
    ),
    "no folder for the trained weights": (
        "offload_folder",
        lambda base: trained(base.parent / "run", without_folder(base)),
    ),
    "PEFT's own function": (
        "zo_hf.offload.get_peft_model",
        lambda base: make_trainer(base.parent / "run", lora(on_disk(base), peft.get_peft_model)),
    ),
    "DoRA": ("init_lora_weights", with_adapter(target_modules=["fc1"], use_dora=True)),
    "factors of the weights": ("init_lora_weights", with_adapter(target_modules=["fc1"], init_lora_weights="pissa")),
    "biases that move": ("bias", with_adapter(target_modules=["fc1"], bias="all")),
    "a copy of a module": (
        "modules_to_save",
        with_adapter(target_modules=["fc1"], modules_to_save=["final_layer_norm"]),
    ),
    "a prefix": ("device_map", with_adapter(peft.PrefixTuningConfig, num_virtual_tokens=2)),
    "a head without values": (
        "score.weight",
        lambda base: make_trainer(base.parent / "run", with_a_new_head(base)),
    ),
    "half of a tied pair": ("lm_head.weight", lambda base: make_trainer(base.parent / "run", half_tied(base))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_one_sentence_that_names_the_way_out(tmp_path: Path, name: str) -> None:
    word, wrong = REFUSED[name]
    base = saved(tmp_path / "base", tiny_opt)
    with pytest.raises(ValueError) as refusal:
        wrong(base)
    message = str(refusal.value).replace("=...", "")
    assert word in message and message.endswith(".") and message.count(". ") == 0 and "; " in message


def test_a_full_disk_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr(os, "truncate", full)
    with pytest.raises(ValueError, match=r"^offload_folder=.*No space left on device"):
        trained(tmp_path / "run", on_disk(saved(tmp_path / "base")))


def test_an_adapter_needs_no_folder(tmp_path: Path) -> None:
    model = lora(without_folder(saved(tmp_path / "base")), get_peft_model)
    trained(tmp_path / "run", model, max_steps=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_tensor_in_a_file_keeps_its_values_and_no_file(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(6).view(2, 3).to(dtype)
    kept = _in_file(values.shape, dtype, str(tmp_path / "made"))
    kept.copy_(values)
    assert torch.equal(kept, values) and kept.dtype == dtype
    assert not list((tmp_path / "made").iterdir())
    assert _in_file(torch.Size((0, 3)), dtype, str(tmp_path)).shape == (0, 3)
