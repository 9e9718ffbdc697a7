"""The counts of a step, a fold, an evaluation and a copy of the weights, for models of real widths and any depth.

A model of one layer and one of two are counted. If all layers are equal, a count is affine in their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.gpu.fake_cuda import CUDA, Counts, fake_cuda
from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.known_losses import IGNORED
from zo_hf.evaluation.model_loss import LossChecks, ModelLoss
from zo_hf.rules import SeededSGD
from zo_hf.subspaces import Folded, Full
from zo_hf.subspaces.per_group import compare_ahead

ROWS, LENGTH = 16, 64
_OPT_1B = {"hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32, "word_embed_proj_dim": 2048}
_LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
#: Models by name: the layers that they have, and what makes one with another number of layers.
MODELS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "OPT-125M": (12, lambda n: _opt(num_hidden_layers=n)),
    "OPT-1.3B": (24, lambda n: _opt(**_OPT_1B, num_hidden_layers=n)),
    "Llama-8B": (32, lambda n: _llama(**_LLAMA_8B, vocab_size=128256, num_hidden_layers=n)),
}


def matrices(model: str) -> int:
    """Return the number of weight matrices of a model."""
    depth, build = MODELS[model]
    with torch.device("meta"):
        return sum(parameter.ndim == 2 for parameter in build(depth).parameters())


def _opt(**options: Any) -> nn.Module:
    return OPTForCausalLM._from_config(OPTConfig(**options), dtype=torch.bfloat16)


def _llama(**options: Any) -> nn.Module:
    return LlamaForCausalLM._from_config(LlamaConfig(**options), dtype=torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """What is counted.

    Args:
        model: a key of `MODELS`.
        settings: options of the engine.
        lora: the rank of a LoRA adapter around the model; 0 for none.
        rows: True for a direction for every row of the batch.
        folds: True to count a fold and a state dict as well, which take long.
        kernels: True to count with those of zo_hf, for which Triton must be installed.
        graph: True to count with a CUDA graph of the forward pass.
    """

    model: str
    settings: Mapping[str, Any]
    lora: int = 0
    rows: bool = False
    folds: bool = False
    kernels: bool = False
    graph: bool = False

    def at_depth(self, layers: int | None = None) -> dict[str, tuple[int, int, int]]:
        """Return launches, reads and uploads of every part, for the model's own number of layers or another one."""
        depth = MODELS[self.model][0] if layers is None else layers
        one, two = (self.counted(count) for count in (1, 2))
        return {
            part: tuple(a + (b - a) * (depth - 1) for a, b in zip(one[part], two[part], strict=True))  # type: ignore[misc]
            for part in one
        }

    def counted(self, layers: int) -> dict[str, tuple[int, int, int]]:
        """Count a model of so many layers."""
        return {part: counts.total for part, counts in self.detailed(layers).items()}

    def detailed(self, layers: int) -> dict[str, Counts]:
        """Count a model of so many layers, by operation."""
        # A run compares the two ways to compute a norm by values, which a device that does not exist has not.
        for norm in (LlamaRMSNorm(8), nn.LayerNorm(8)):
            compare_ahead(norm, dict(norm.named_parameters()))
        with fake_cuda(self.kernels) as counts:
            with torch.device(CUDA):
                inner = MODELS[self.model][1](layers).eval()
                model = _with_lora(inner, self.lora) if self.lora else inner
            return _parts(counts, model, inner, self)


def _with_lora(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")).eval()


def batch() -> dict[str, Tensor]:
    """Return a batch on the device."""
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device=CUDA)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros_like(ids)}


def last_labels() -> Tensor:
    """Return the labels of a batch whose last token is its label, as the data loader leaves them on the host."""
    return torch.full((ROWS, LENGTH), IGNORED).index_fill_(1, torch.tensor([LENGTH - 1]), 0)


def _parts(counts: Counts, model: nn.Module, inner: Any, case: Case) -> dict[str, Counts]:
    found: dict[str, Counts] = {}

    def count(part: str, action: Callable[[], Any]) -> None:
        counts.clear()
        with torch.no_grad():
            action()
        found[part] = Counts(counts.launches.copy(), counts.reads.copy(), counts.uploads.copy())

    inputs, labels = batch(), last_labels()
    # The rows of all probes, as in a step.
    both = {k: v.repeat(2, 1) for k, v in inputs.items() if k != "labels"}
    where = torch.tensor([LENGTH - 2], device=CUDA)
    count("forward", lambda: model(**both, use_cache=False, logits_to_keep=where))
    options = {"subspace": "low_rank", "rows_per_direction": int(case.rows), "batched_probes": True}
    options |= {"cuda_graph": case.graph}
    zo = ZerothOrder(model, **options | dict(case.settings))
    if zo.row_groups is not None:
        zo.row_groups.comes_apart = True  # the first batch decides by values
        zo.row_groups.expect(ROWS, 1)
    optimizer = zo.prepare(sgd(zo))
    checks = LossChecks(is_known=True)

    def step() -> None:
        whole = inputs | {"use_cache": False}
        zo.estimate(
            ModelLoss(model, inner, whole, lambda given: model(**given).loss, checks=checks, labels_on_host=labels)
        )
        optimizer.step()

    for _ in range(2):  # the first one draws and compares more
        count("step", step)
    clean = inputs | {"use_cache": False}
    del clean["labels"]
    for _ in range(2):
        count("evaluation", lambda: model(**clean, logits_to_keep=where))
    if case.folds and isinstance(zo.subspace, Folded):
        count("fold", lambda: zo.subspace.fold(zo.step, {}))
        step()
        count("state dict", lambda: model.state_dict())
    zo.subspace.detach()
    return found


def sgd(zo: ZerothOrder) -> torch.optim.Optimizer:
    """Return the optimizer of a run on a GPU."""
    if isinstance(zo.subspace, Full):
        return SeededSGD(zo.coordinates(), zo.subspace, lr=1e-3)
    return torch.optim.SGD(zo.coordinates(), lr=1e-3, foreach=True)
