"""The subspaces that the suite covers, with few coordinates each: a new one is one more entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import nn

from tests.quantized_models import quantize
from tests.unbiased.losses import Loss

#: In the names of Llama, BERT and T5.
QUERIES = r".*(q_proj|query|SelfAttention\.q)"
VALUES = r".*(v_proj|value|SelfAttention\.v)"
NORMS = r".*(norm|Norm).*weight"
EMBEDDINGS = r".*(embed_tokens|word_embeddings|shared).*"
OF_ADAPTERS = r".*(lora_|ia3_|prompt_encoder).*"


@dataclass(frozen=True)
class Space:
    """The coordinates of a run.

    Args:
        options: of the config, without `zo_` in front.
        directions: those of a complete set: a power of two, and at least the number of coordinates.
        prepare: makes the model ready, given the loss.
        has_tasks: whether it needs a task that PEFT knows.
    """

    options: Mapping[str, Any]
    directions: int = 32
    prepare: Callable[[nn.Module, Loss], nn.Module] = field(default=lambda model, loss: model)
    has_tasks: bool = False


def adapter(kind: str, **options: Any) -> Callable[[nn.Module, Loss], nn.Module]:
    """Wraps a model by PEFT, and moves its new weights away from where they begin."""

    def prepare(model: nn.Module, loss: Loss) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            found = peft.get_peft_model(model, getattr(peft, kind)(task_type=loss.task, **options)).eval()
            for name, parameter in found.named_parameters():
                if parameter.requires_grad and "modules_to_save" not in name:
                    parameter.data.add_(torch.randn(parameter.shape), alpha=0.3)
        return found

    return prepare


def _adapter(kind: str, directions: int = 32, **options: Any) -> Space:
    moves = {"subspace": "adapter", "target_modules": OF_ADAPTERS}
    return Space(moves, directions, adapter(kind, **options), has_tasks=kind == "PrefixTuningConfig")


SPACES = {
    "low_rank": Space({"subspace": "low_rank", "rank": 1, "target_modules": f"{VALUES}.weight"}, 8),
    "low_rank, several matrices": Space(
        {"subspace": "low_rank", "rank": 2, "target_modules": f"({QUERIES}|{VALUES}).*"}
    ),
    "core": Space({"subspace": "core", "rank": 2, "target_modules": f"({QUERIES}|{VALUES}).weight"}, 16),
    "norms": Space({"subspace": "norms", "target_modules": NORMS}),
    "embeddings": Space({"subspace": "low_rank", "rank": 2, "target_modules": EMBEDDINGS}, 16),
    "full": Space({"subspace": "full", "target_modules": f"{VALUES}.weight"}),
    "full, embeddings": Space({"subspace": "full", "target_modules": EMBEDDINGS}),
    "scales": Space(
        {"subspace": "scales", "target_modules": f"{VALUES}.weight"}, 8, lambda model, loss: quantize(model)
    ),
    "lora": _adapter("LoraConfig", r=1, target_modules=VALUES),
    "dora": _adapter("LoraConfig", r=1, target_modules=VALUES, use_dora=True),
    "ia3": _adapter("IA3Config", 8, target_modules=VALUES, feedforward_modules=[]),
    "prefix": _adapter("PrefixTuningConfig", num_virtual_tokens=2),
}
