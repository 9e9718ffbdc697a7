"""Every method of PEFT that the suite covers: a new one is one more entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conftest import TinyTask, causal_batch, seeded, tiny_llama
from zo_hf.subspaces.peft_methods import tokens_in_front

ATTENTION = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Method:
    """How to wrap a tiny Llama, and what is special about it.

    Args:
        config: name of PEFT's class, and its arguments.
        differentiable: whether autograd's gradient is that of the forward pass; DoRA's leaves a norm out of it.
        float64: whether PEFT computes it in float64.
        batchable: whether probes can share a forward pass.
        inputs: what a batch of some rows needs beside tokens.
        lr: step length (`zo_normalize`) with which it learns `TinyTask` a little in few steps.
        build: makes the base model.
    """

    config: tuple[str, dict[str, Any]]
    differentiable: bool = True
    float64: bool = True
    batchable: bool = True
    inputs: Callable[[int], dict[str, Tensor]] = field(default=lambda rows: {})
    lr: float = 0.06

    def model(self, dtype: torch.dtype = torch.float32, moved: float = 0.0) -> nn.Module:
        """The wrapped model, which depends on nothing but these arguments, in evaluation mode.

        Args:
            moved: standard deviation of noise on the adapter's weights, to be away from where some begin at zero.
        """
        kind, options = self.config
        base = seeded(tiny_llama, initializer_range=0.2)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = peft.get_peft_model(base, getattr(peft, kind)(**options)).to(dtype).eval()
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(noise.to(dtype), alpha=moved)
        return model

    def batch(self, rows: int = 4) -> dict[str, Tensor]:
        """Random tokens of which the last is a label, and whatever else the method wants."""
        return causal_batch(rows) | self.inputs(rows)

    def exact_loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy in the dtype of the logits."""
        logits = model(**{k: v for k, v in batch.items() if k != "labels"})["logits"]
        logits = logits[:, tokens_in_front(model) :]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def task(self, size: int = 64) -> torch.utils.data.Dataset:
        """`TinyTask`, with what the method wants beside."""
        return _WithInputs(size, self.inputs(size))


class _WithInputs(TinyTask):
    def __init__(self, size: int, inputs: dict[str, Tensor]) -> None:
        super().__init__(size)
        self.inputs = inputs

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return super().__getitem__(index) | {name: tensor[index] for name, tensor in self.inputs.items()}


def _tasks(rows: int) -> dict[str, Tensor]:
    return {"task_ids": torch.arange(rows) % 2}


def _lora(**options: Any) -> tuple[str, dict[str, Any]]:
    return "LoraConfig", {"r": 2, "target_modules": [*ATTENTION, "down_proj"]} | options


def _at_attention(kind: str, **options: Any) -> tuple[str, dict[str, Any]]:
    return kind, {"target_modules": ATTENTION} | options


def _prompt(kind: str, **options: Any) -> tuple[str, dict[str, Any]]:
    return kind, {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"} | options


_ADAPTION = ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 2, "task_type": "CAUSAL_LM"})
_IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
_TOKENS = {"token_indices": [*range(5, 60)], "target_modules": ["embed_tokens"]}
_MULTITASK = ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 3, "num_tasks": 2, "task_type": "CAUSAL_LM"})
_VBLORA = {"r": 2, "num_vectors": 8, "vector_length": 16, "topk": 2}
_NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]

METHODS = {
    "lora": Method(_lora()),
    "lora rank-stabilised": Method(_lora(use_rslora=True)),
    "lora on all-linear": Method(_lora(target_modules="all-linear")),
    "lora on embeddings": Method(_lora(target_modules=["embed_tokens", "q_proj"])),
    "lora with biases": Method(_lora(bias="lora_only", lora_bias=True)),
    "lora with modules to save": Method(_lora(modules_to_save=["lm_head"])),
    "lora with tokens": Method(_lora(trainable_token_indices=[*range(5, 60)])),
    "lora from principal components": Method(_lora(init_lora_weights="pissa")),
    "dora": Method(_lora(use_dora=True), differentiable=False),
    "dora on embeddings": Method(
        _lora(use_dora=True, target_modules=["embed_tokens", "q_proj"]), differentiable=False
    ),
    "qalora": Method(_lora(use_qalora=True, qalora_group_size=4)),
    "adamss": Method(_at_attention("AdamssConfig", r=8)),
    "adaption prompt": Method(_ADAPTION, float64=False),
    "beft": Method(_at_attention("BeftConfig", target_modules=["v_proj"])),
    "boft": Method(_at_attention("BOFTConfig", boft_block_size=4)),
    "c3a": Method(_at_attention("C3AConfig", block_size=8), float64=False, lr=0.6),
    "cartridge": Method(_prompt("CartridgeConfig", num_frozen_tokens=1), batchable=False, lr=0.1),
    "deft": Method(_at_attention("DeftConfig", r=2)),
    "delora": Method(_at_attention("DeloraConfig", r=2)),
    "fourierft": Method(_at_attention("FourierFTConfig", n_frequency=8), float64=False),
    "frod": Method(_at_attention("FrodConfig")),
    "glora": Method(_at_attention("GloraConfig", r=2)),
    "gralora": Method(_at_attention("GraloraConfig", r=4)),
    "hira": Method(_at_attention("HiraConfig", r=2), lr=0.1),
    "hra": Method(_at_attention("HRAConfig", r=2)),
    "ia3": Method(("IA3Config", _IA3)),
    "lily": Method(_at_attention("LilyConfig", r=2)),
    "ln tuning": Method(("LNTuningConfig", {"target_modules": _NORMS})),
    "loha": Method(_at_attention("LoHaConfig", r=2)),
    "lokr": Method(_at_attention("LoKrConfig", r=2)),
    "miss": Method(_at_attention("MissConfig", r=2)),
    "multitask prompt tuning": Method(_MULTITASK, inputs=_tasks, batchable=False),
    "oft": Method(_at_attention("OFTConfig", oft_block_size=4)),
    "p-tuning": Method(_prompt("PromptEncoderConfig", encoder_hidden_size=8), batchable=False),
    "peanut": Method(_at_attention("PeanutConfig")),
    "poly": Method(_at_attention("PolyConfig", r=2, n_tasks=2, task_type="CAUSAL_LM"), inputs=_tasks, lr=0.1),
    "prefix tuning": Method(_prompt("PrefixTuningConfig")),
    "prefix tuning, projected": Method(_prompt("PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=8)),
    "prompt tuning": Method(_prompt("PromptTuningConfig"), batchable=False),
    "psoft": Method(_at_attention("PsoftConfig", r=4)),
    "pvera": Method(_at_attention("PveraConfig", r=8)),
    "randlora": Method(_at_attention("RandLoraConfig", r=4), lr=0.02),
    "road": Method(_at_attention("RoadConfig", group_size=8)),
    "shadow": Method(("ShadowConfig", {"task_type": "CAUSAL_LM"}), batchable=False),
    "shira": Method(_at_attention("ShiraConfig", r=2)),
    "tinylora": Method(_at_attention("TinyLoraConfig", r=2)),
    "trainable tokens": Method(("TrainableTokensConfig", _TOKENS)),
    "unilora": Method(_at_attention("UniLoraConfig", r=2)),
    "vblora": Method(_at_attention("VBLoRAConfig", **_VBLORA), lr=0.1),
    "vera": Method(_at_attention("VeraConfig", r=8)),
    "waveft": Method(_at_attention("WaveFTConfig", n_frequency=8)),
}


# What most people train; the rest of the whole runs through a Trainer are slow tests.
COMMON = {"lora", "dora", "ia3", "ln tuning", "p-tuning", "prefix tuning", "prompt tuning", "vera"}


def every_method(
    which: Callable[[Method], bool] = lambda method: True, only_common_by_default: bool = False
) -> pytest.MarkDecorator:
    """Parametrises a test by `method`; an installed PEFT that lacks one leaves it out."""
    known = {name: m for name, m in METHODS.items() if which(m) and m.config[0] in dir(peft)}
    slow = {name for name in known if only_common_by_default and name not in COMMON}
    cases = [pytest.param(m, id=name, marks=[pytest.mark.slow] * (name in slow)) for name, m in known.items()]
    return pytest.mark.parametrize("method", cases)
