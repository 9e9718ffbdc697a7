"""A model with quantised layers: which they are, letting Trainer take it, and loading weights into it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers.trainer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from zo_hf.quantization.bitsandbytes_4bit import BitsAndBytes4Bit
from zo_hf.quantization.bitsandbytes_int8 import BitsAndBytesInt8
from zo_hf.quantization.layer import QuantizedLayer
from zo_hf.quantization.torchao_int8 import TorchAOInt8


def quantized_layers(model: nn.Module) -> dict[nn.Module, QuantizedLayer]:
    """The quantised linear layers of a model, each ready to be read: what their first forward would move is moved."""
    layers = {}
    for module in model.modules():
        layer = _quantized_layer(module)
        if layer is not None:
            layers[module] = layer
    return layers


def _quantized_layer(module: nn.Module) -> QuantizedLayer | None:
    weight: Any = module._parameters.get("weight")
    if any(
        kind.__module__.startswith("bitsandbytes.") for kind in type(module).__mro__
    ):  # imported only if it is used
        import bitsandbytes

        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            return None if weight.dtype != torch.int8 else BitsAndBytesInt8(module)
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            return None if weight.quant_state is None else BitsAndBytes4Bit(module)
    if type(weight).__module__.startswith("torchao."):
        is_plain_int8 = type(weight).__name__ == "Int8Tensor" and weight.scale.shape == (*weight.shape[:1], 1)
        shifted = is_plain_int8 and weight.zero_point is not None and bool(weight.zero_point.any())
        readable = is_plain_int8 and not shifted and weight.act_quant_kwargs is None
        return TorchAOInt8(module) if readable and isinstance(module, nn.Linear) else QuantizedLayer(module)
    # GPTQ, AWQ and the like have a class of their own: codes in buffers, and no weight.
    sizes = [module.__dict__.get(name) for name in ("in_features", "out_features")]
    is_leaf = not module._modules and all(isinstance(size, int) for size in sizes)
    has_codes = any(not buffer.is_floating_point() for buffer in module._buffers.values() if buffer is not None)
    return QuantizedLayer(module) if is_leaf and weight is None and has_codes else None


def is_quantized(model: nn.Module) -> bool:
    """Whether transformers loaded it quantised."""
    return isinstance(model, PreTrainedModel) and bool(getattr(model, "is_quantized", False))


@contextmanager
def training_allowed() -> Iterator[None]:
    """Inside this context Trainer can be made with a purely quantised model, which backward passes could not train.

    Only Trainer's own check is left out, and nothing that the model says of itself changes.
    """
    with mock.patch.object(transformers.trainer, "validate_quantization_for_training", lambda model: None):
        yield


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Put the weights that a checkpoint folder holds into a quantised model of the same format, in place.

    `load_state_dict` cannot: bitsandbytes refuses int8 scales after any forward, and does not read 4-bit ones at all.

    Raises:
        ValueError: the folder holds no weights, or those of another model or format; the message names the first.
    """
    parts = stored_tensors(model)
    read = set()
    for path in _files(folder):
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            for name in names & parts.keys():
                tensor = file.get_tensor(name)
                if (tensor.shape, tensor.dtype) != (parts[name].shape, parts[name].dtype):
                    raise ValueError(f"{name} in {folder} is in another format; load weights of this model's format.")
                parts[name].copy_(tensor)
            read |= names
    missing = sorted(parts.keys() - read)
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}; load weights of the same model in the same format.")


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a checkpoint of the model holds, live, under the name it has there; tied ones once."""
    layers = quantized_layers(model)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        own = dict(module._parameters) | {
            k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set
        }
        if module in layers:
            layer = layers[module]
            own = {name: tensor for name, tensor in own.items() if name != "weight"}
            own |= {layer.saved_name(part): tensor for part, tensor in layer.storage().items()}
        for name, tensor in own.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[f"{prefix}.{name}" if prefix else name] = tensor
    return tensors


def _files(folder: Path) -> list[Path]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if not (folder / SAFE_WEIGHTS_NAME).exists():
        raise ValueError(f"{folder} has no {SAFE_WEIGHTS_NAME}; nothing can be loaded from it.")
    return [folder / SAFE_WEIGHTS_NAME]
