"""Memory of quantized linear layers as bitsandbytes stores and computes them: their weights and their scratch space.

int8:  a byte for every weight and a float32 for every output row. Inputs are quantized, and products are int32. Probes
use
       the exact product instead, which converts some rows of the weight at a time to float32, then to the inputs'
       dtype.
nf4:   half a byte for every weight and a float32 for every 64 of them (double quantized: a byte, and a float32 for
       every 256 of those bytes). The whole weight is dequantized for its product.

Embeddings, norms, biases and the head stay in the model's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zo_hf.quantization.layer import TILE

NF4_BLOCK = 64
DOUBLE_BLOCK = 256


def quantizable_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the layers that bitsandbytes quantizes, by name: all linear layers except the head.

    Call this before PEFT adds an adapter, whose linear layers stay in float32.
    """
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def saved_bytes(layers: Iterable[nn.Module], base: str) -> int:
    """Return how many bytes the layers' quantized weights save compared with the weights in the model's dtype."""
    saved = 0
    for layer in layers:
        weight: Any = layer.weight
        saved += weight.numel() * weight.element_size() - weight_bytes(weight.numel(), features_out(layer), base)
    return saved


def weight_bytes(count: int, rows: int, base: str) -> int:
    """Return the bytes of a quantized weight of `count` elements and `rows` output rows, including its scales."""
    if base == "int8":
        return count + 4 * rows
    blocks = -(-count // NF4_BLOCK)
    scales = 4 * blocks if base == "nf4" else blocks + 4 * -(-blocks // DOUBLE_BLOCK) + 4 * DOUBLE_BLOCK
    return -(-count // 2) + scales


def features_out(layer: nn.Module) -> int:
    """Return the output features of a linear layer."""
    weight: Any = layer.weight
    return weight.shape[1] if isinstance(layer, Conv1D) else weight.shape[0]


def scale_count(layer: nn.Module, base: str) -> int:
    """Return the number of a layer's scales: one for every output row in int8, one for every block in nf4."""
    weight: Any = layer.weight
    return features_out(layer) if base == "int8" else -(-weight.numel() // NF4_BLOCK)


@contextmanager
def computed_in(layers: Iterable[nn.Module], base: str, at_probes: bool) -> Iterator[None]:
    """Make the layers' forward allocate the scratch space of their format while the context is open."""
    layers = list(layers)
    int8 = _int8_exact if at_probes else _int8
    for layer in layers:
        layer.__dict__["forward"] = functools.partial(int8 if base == "int8" else _nf4, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _int8(layer: nn.Module, x: Tensor) -> Tensor:
    """Allocate what each step of bitsandbytes' MatMul8bitLt allocates."""
    half = x.to(torch.float16)
    codes = half.to(torch.int8)
    products = torch.empty(*x.shape[:-1], features_out(layer), dtype=torch.int32)
    del half, codes
    output = products.to(torch.float16)
    del products
    return output.to(x.dtype)


def _int8_exact(layer: nn.Module, x: Tensor) -> Tensor:
    """Allocate what zo_hf's own product allocates, for one tile of rows; no other tile needs more."""
    output = torch.empty(*x.shape[:-1], features_out(layer), dtype=x.dtype)
    rows = min(max(1, TILE // x.shape[-1]), features_out(layer))
    decoded = torch.empty(rows, x.shape[-1])
    _product = x @ decoded.to(x.dtype).t()
    return output


def _nf4(layer: nn.Module, x: Tensor) -> Tensor:
    return _ProductWithDequantized.apply(x, layer)


class _ProductWithDequantized(torch.autograd.Function):
    """x · Wᵀ with the whole of W dequantized in the forward pass and again in the backward pass; neither keeps it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        weight = torch.empty_like(layer.weight)
        return x @ (weight if isinstance(layer, Conv1D) else weight.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight = torch.empty_like(ctx.layer.weight)
        return gradients[0] @ (weight.t() if isinstance(ctx.layer, Conv1D) else weight), None
