"""Steps that `zo-hf bench` times, on models with random weights: the engine's, a bare forward pass, and MeZO's loop."""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedConfig, PreTrainedModel

from zo_hf.directions import Distribution
from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.model_loss import LossChecks, ModelLoss
from zo_hf.quantization import quantized_layers
from zo_hf.rules import SeededSGD
from zo_hf.subspaces import Full
from zo_hf.subspaces.subspace import Subspace

_OPT: dict[str, dict[str, Any]] = {
    "opt-125m": {},
    "opt-1.3b": {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32},
    "opt-13b": {"hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40, "num_attention_heads": 40},
    "tiny": {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 512},
}
_LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    name: functools.partial(OPTConfig, **sizes, word_embed_proj_dim=sizes.get("hidden_size", 768))
    for name, sizes in _OPT.items()
} | {"llama-8b": functools.partial(LlamaConfig, **_LLAMA_8B)}
LEARNING_RATE = 1e-7
EPS = 1e-3


def build(args: argparse.Namespace) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return a model with random weights, and a batch whose last token is the label."""
    config = SHAPES[args.shape]()
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
        model.config.use_cache = False  # as Trainer does, and the engine; here for the bare forward pass as well
        if args.quantization is not None:
            quantize(model, args.quantization)
        ids = torch.randint(5, config.vocab_size, (args.rows, args.length))
        labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def quantize(model: nn.Module, kind: str) -> None:
    """Replace the linear layers, except the output layer, by those of bitsandbytes, as transformers does."""
    import bitsandbytes

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear) or name == "lm_head":
                continue
            sizes, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
            if kind == "int8":
                new = bitsandbytes.nn.Linear8bitLt(*sizes, has_bias, has_fp16_weights=False, threshold=6.0)
                new.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False)
            else:
                new = bitsandbytes.nn.Linear4bit(*sizes, has_bias, quant_type=kind)
                new.weight = bitsandbytes.nn.Params4bit(layer.weight.data, quant_type=kind, module=new)
            new.bias = layer.bias
            setattr(parent, name, new.to(layer.weight.device).eval())
    quantized_layers(model)


@dataclass(frozen=True)
class Step:
    """A step of a variant, which a call runs.

    Attributes:
        run: runs it.
        distribution: draws its directions; None if the engine does not draw them.
        subspace: moves the model's weights; None if a variant leaves the model's forwards as they are.
    """

    run: Callable[[], None]
    distribution: Distribution | None = None
    subspace: Subspace | None = None

    def __call__(self) -> None:
        self.run()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the variant to the model inside this context, because all variants share one model."""
        if self.subspace is not None:
            self.subspace.attach()
        try:
            yield
        finally:
            if self.subspace is not None:
                self.subspace.detach()


Batch = dict[str, Tensor]
Variant = Callable[[PreTrainedModel, Batch], Step]


def forward(model: PreTrainedModel, batch: Batch) -> Step:
    """Return a bare forward pass over the rows of both probes."""
    inputs = {name: batch[name].repeat(2, 1) for name in ("input_ids", "attention_mask")}
    position = torch.tensor([inputs["input_ids"].shape[1] - 2], device=inputs["input_ids"].device)

    def step() -> None:
        with torch.no_grad():
            model(**inputs, logits_to_keep=position)

    return Step(step)


def forward_exact(model: PreTrainedModel, batch: Batch) -> Step:
    """Return a bare forward pass with the product that probes use in quantized layers."""
    layers, bare = quantized_layers(model), forward(model, batch)

    def step() -> None:
        for module, layer in layers.items():
            module.__dict__["forward"] = layer.forward
        bare()
        for module in layers:
            del module.__dict__["forward"]

    return Step(step)


def zeroth_order(subspace: str, direction: str, adapter: bool = False, rows: int = 0, graph: bool = False) -> Variant:
    """Return a variant that makes a whole step of the engine: probes, estimate, update.

    Args:
        subspace, direction: options of the engine.
        adapter: True wraps the model in a LoRA adapter.
        rows: rows that share a direction; 0 for all.
        graph: True replays the forward pass of all probes as a CUDA graph.
    """

    def variant(model: PreTrainedModel, batch: Batch) -> Step:
        inner = model
        if adapter:  # PEFT wraps layers in place, and the other variants need the original model
            from peft import LoraConfig, get_peft_model

            inner = copy.deepcopy(model)
            model = get_peft_model(inner, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).eval()
        options: dict[str, Any] = {"rows_per_direction": rows, "batched_probes": True, "cuda_graph": graph}
        zo = ZerothOrder(model, subspace, eps=EPS, direction=direction, **options)
        groups = zo.coordinates()
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE)
        if isinstance(zo.subspace, Full):
            optimizer = SeededSGD(groups, zo.subspace, lr=LEARNING_RATE)
        zo.prepare(optimizer)
        checks, divides = LossChecks(), not isinstance(zo.subspace, Full)
        zo.subspace.detach()

        def step() -> None:
            zo.estimate(
                ModelLoss(model, inner, batch, lambda inputs: model(**inputs).loss, checks=checks, divides=divides)
            )
            optimizer.step()

        return Step(step, zo.distribution, zo.subspace)

    return variant


def textbook(model: PreTrainedModel, batch: Batch) -> Step:
    """Return a step of MeZO as its authors published it: four out-of-place passes over the weights, each drawing z again."""

    def draw(parameter: Tensor) -> Tensor:
        return torch.normal(mean=0.0, std=1.0, size=parameter.shape, dtype=parameter.dtype, device=parameter.device)

    def perturb(scale: float) -> None:
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data = parameter.data + scale * draw(parameter) * EPS

    def update(projected_gradient: float, weight_decay: float = 0.0) -> None:
        torch.manual_seed(0)
        for parameter in model.parameters():
            z = draw(parameter)
            parameter.data = parameter.data - LEARNING_RATE * (projected_gradient * z + weight_decay * parameter.data)

    def loss() -> float:
        return model(**batch).loss.item()

    def step() -> None:
        with torch.no_grad():
            perturb(1)
            plus = loss()
            perturb(-2)
            minus = loss()
            perturb(1)
            update((plus - minus) / (2 * EPS))

    return Step(step)


VARIANTS: dict[str, Variant] = {
    "forward": forward,
    "low_rank": zeroth_order("low_rank", "gaussian"),
    "low_rank-rows": zeroth_order("low_rank", "gaussian", rows=1),
    "low_rank-rows-rademacher": zeroth_order("low_rank", "rademacher", rows=1),
    "adapter": zeroth_order("adapter", "gaussian", adapter=True),
    "full-rademacher": zeroth_order("full", "rademacher"),
    "full-gaussian": zeroth_order("full", "gaussian"),
    "textbook-mezo": textbook,
}

#: Those that need a GPU. Graphs read addresses, so a variant that moves the weights elsewhere must not run beside them.
GRAPH_VARIANTS: dict[str, Variant] = {
    "low_rank-graph": zeroth_order("low_rank", "gaussian", graph=True),
    "low_rank-rows-graph": zeroth_order("low_rank", "rademacher", rows=1, graph=True),
}

QUANTIZED_VARIANTS: dict[str, Variant] = {
    "forward": forward,
    "forward-exact": forward_exact,
    "low_rank": zeroth_order("low_rank", "gaussian"),
    "scales": zeroth_order("scales", "gaussian"),
    "adapter": zeroth_order("adapter", "gaussian", adapter=True),
}


def variants(args: argparse.Namespace) -> dict[str, Variant]:
    """Return the variants that apply to the requested model."""
    if args.quantization is not None:
        return QUANTIZED_VARIANTS
    return VARIANTS | (GRAPH_VARIANTS if args.device.startswith("cuda") else {})
