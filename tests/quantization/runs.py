"""Training runs of a tiny quantized model in every way and every format that it goes with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from tests.conftest import assert_same_bits, seeded, tiny_llama
from tests.quantized_models import HAS_TORCHAO
from tests.trainer.runs import SaveAt, make_trainer, with_lora
from zo_hf import ZOTrainer
from zo_hf.quantization import stored_tensors
from zo_hf.trajectory import replay

KINDS = ["int8", "nf4", "nf4 nested", *(["torchao"] if HAS_TORCHAO else [])]
SETUPS: dict[str, dict[str, Any]] = {
    "adapter": {"zo_subspace": "adapter", "zo_fold_steps": None},
    "factors": {"zo_subspace": "low_rank", "zo_fold_steps": None},
    "folds": {"zo_subspace": "low_rank", "zo_fold_steps": 3},
    "core": {"zo_subspace": "core", "zo_fold_steps": 3, "zo_rank": 8},
    "scales": {"zo_subspace": "scales", "zo_fold_steps": None},
    "norms": {"zo_subspace": "norms", "zo_fold_steps": None},
}
# Which end as a PEFT model.
ADAPTERS = ("adapter", "factors")
# By default every way in one format, and in others where codes or scales are written.
QUICK = [("adapter", "int8"), ("factors", "nf4 nested"), ("core", "nf4 nested"), ("norms", "int8")]
QUICK += [(way, kind) for way in ("folds", "scales") for kind in ("int8", "nf4 nested")]
QUICK += [("folds", "torchao")]
CASES = [
    pytest.param(way, kind, marks=[] if (way, kind) in QUICK else pytest.mark.slow) for way in SETUPS for kind in KINDS
]


def write_base(folder: Path, build: Callable[..., nn.Module] = tiny_llama, **options: Any) -> Path:
    """A tiny model of one layer, not quantized, to be loaded from `folder` by `load`."""
    seeded(build, **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1} | options).save_pretrained(
        folder
    )
    return folder


def quantization(kind: str) -> Any:
    """transformers' description of a format."""
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(version=2))
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=kind == "nf4 nested",
        bnb_4bit_compute_dtype=torch.float32,
    )


def load(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The base, quantized as it is loaded."""
    config = quantization(kind)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=dtype)


def model_for(way: str, base: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The base as a way of training expects it."""
    model = load(base, kind, dtype)
    return with_lora(model) if way == "adapter" else model


def trainer_for(folder: Path, way: str, base: Path, kind: str, **options: Any) -> ZOTrainer:
    """A trainer of seven short steps."""
    defaults = {"max_steps": 7, "learning_rate": 1e-3, **SETUPS[way]}
    dtype = options.pop("dtype", torch.float32)
    return make_trainer(folder, model_for(way, base, kind, dtype), **defaults | options)


def run(folder: Path, way: str, base: Path, kind: str, resume: Any = None, **options: Any) -> ZOTrainer:
    """`trainer_for`, after its `train`."""
    trainer = trainer_for(folder, way, base, kind, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def resumed_and_replayed(folder: Path, kind: str, **options: Any) -> ZOTrainer:
    """A run that folds, of which a resume from its fourth step and a replay of its log have given the same bits."""
    base, options = write_base(folder / "base"), {"max_steps": 5} | options
    whole = run(folder / "whole", "folds", base, kind, more={"callbacks": [SaveAt(4)]}, **options)
    resumed = run(folder / "resumed", "folds", base, kind, resume=str(folder / "whole" / "checkpoint-4"), **options)
    assert_same_bits(held(resumed.model), held(whole.model))
    assert_same_bits(held(replay(load(base, kind), folder / "whole")), held(whole.model))
    return whole


def saved_model(folder: Path, way: str, base: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """What a folder that a run has written holds, as a user of transformers and PEFT would load it."""
    if way in ADAPTERS:
        return PeftModel.from_pretrained(load(base, kind, dtype), folder)
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=dtype)


def held(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that the model holds: codes, scales and everything else."""
    return {name: tensor.detach().clone() for name, tensor in stored_tensors(model).items()}


def loss_of(folder: Path, model: nn.Module) -> float:
    """Its loss on the tiny task, from a trainer that has trained nothing."""
    return make_trainer(folder, model, zo_subspace="auto", zo_fold_steps=None).evaluate()["eval_loss"]
