"""Quantized models without a download: layers quantized in place, and what they stand for as plain weights."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zo_hf.quantization import QuantizedLayer, quantized_layers

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
FORMATS = ["int8", "nf4", "nf4 nested", "fp4", *(["torchao"] if HAS_TORCHAO else [])]


def quantized_linear(weight: Tensor, bias: Tensor | None, kind: str) -> nn.Module:
    """A linear layer of one of `FORMATS`. weight: (m, n)"""
    with torch.random.fork_rng():  # what a new layer draws for itself is replaced
        return _quantized_linear(weight, bias, kind)


def _quantized_linear(weight: Tensor, bias: Tensor | None, kind: str) -> nn.Module:
    import bitsandbytes as bnb

    (m, n), with_bias = weight.shape, bias is not None
    layer: Any
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        layer = nn.Linear(n, m, bias=with_bias)
        layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        quantize_(layer, Int8WeightOnlyConfig(version=2))
    elif kind == "int8":
        layer = bnb.nn.Linear8bitLt(n, m, bias=with_bias, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight.detach().clone(), requires_grad=False).to("cpu")
    else:
        layer = bnb.nn.Linear4bit(n, m, bias=with_bias)
        layer.weight = bnb.nn.Params4bit(
            weight.detach().clone(),
            requires_grad=False,
            compress_statistics=kind == "nf4 nested",
            quant_type=kind.split()[0],
        ).to("cpu")
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer.eval()


def quantize(model: nn.Module, kind: str = "int8", only: Sequence[str] | None = None) -> nn.Module:
    """The model with its linear layers quantized in place, except the output layer, as transformers does it.

    Args:
        only: the last names of the layers; None means all.
    """
    get_output = getattr(model, "get_output_embeddings", lambda: None)
    output = get_output()
    for name, module in list(model.named_modules()):
        chosen = only is None or name.rpartition(".")[2] in only
        if isinstance(module, nn.Linear | Conv1D) and module is not output and chosen:
            weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
            layer = quantized_linear(weight.contiguous(), module.bias, kind)
            layer.train(module.training)
            model.set_submodule(name, layer)
    quantized_layers(model)  # keeps 4-bit layers from being packed for the CPU, as the trainer does
    return model


def layer_of(module: nn.Module) -> QuantizedLayer:
    """The engine's view of one quantized layer."""
    return quantized_layers(module)[module]


def decoded(layer: QuantizedLayer) -> Tensor:
    """The whole weight that a layer stands for, float32 (m, n)."""
    return layer.dequantize(layer.storage(), 0, layer.shape[0])


def dequantized(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of the model in which plain linear layers hold what the quantized ones stand for."""
    plain = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        layer = quantized_layers(module).get(module)
        if layer is not None:
            linear = nn.utils.skip_init(nn.Linear, layer.shape[1], layer.shape[0], bias=layer.bias is not None)
            linear.weight.data = decoded(layer).to(dtype)
            if layer.bias is not None:
                linear.bias.data = layer.bias.detach().clone().to(dtype)
            plain.set_submodule(name, linear.eval())
    return plain


def parts_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the codes and scales of every quantized layer, by name."""
    names = {module: name for name, module in model.named_modules()}
    return {
        f"{names[module]}.{part}": tensor.detach().clone()
        for module, layer in quantized_layers(model).items()
        for part, tensor in layer.storage().items()
    }


def count_calls(target: Any, method: str, patch: Any) -> list[Any]:
    """The first arguments of every call of a method from now on."""
    seen: list[Any] = []
    original: Callable = getattr(target, method)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return original(self, *args, **kwargs)

    patch.setattr(target, method, counted)
    return seen
