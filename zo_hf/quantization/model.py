"""Models with quantized layers: finding the layers and their tensors, and making Trainer accept the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers.trainer
from torch import Tensor, nn
from transformers import PreTrainedModel

from zo_hf.quantization.bitsandbytes_4bit import BitsAndBytes4Bit
from zo_hf.quantization.bitsandbytes_int8 import BitsAndBytesInt8
from zo_hf.quantization.layer import QuantizedLayer
from zo_hf.quantization.torchao_int8 import TorchAOInt8


def quantized_layers(model: nn.Module) -> dict[nn.Module, QuantizedLayer]:
    """Return the quantized linear layers of a model, prepared for reading.

    The first forward of some formats rearranges their tensors. This function does so beforehand.
    """
    layers = {}
    for module in model.modules():
        layer = _quantized_layer(module)
        if layer is not None:
            layers[module] = layer
    return layers


def coded_layers(model: nn.Module) -> dict[nn.Module, int]:
    """Return all layers whose weights are stored as codes, and the number of weights of each.

    These are the layers of `quantized_layers` and others with codes in parameters, such as EETQ's and the experts of MXFP4.
    Of layers without `in_features` and `out_features`, the codes are counted.
    """
    layers = {module: layer.shape.numel() for module, layer in quantized_layers(model).items()}
    for module in model.modules():
        codes = sum(p.numel() for p in _parameters_of_codes(module).values() if is_coded(p))
        if module not in layers and codes:
            layers[module] = codes
    return layers


def _quantized_layer(module: nn.Module) -> QuantizedLayer | None:
    weight: Any = module._parameters.get("weight")
    if any(kind.__module__.startswith("bitsandbytes.") for kind in type(module).__mro__):
        import bitsandbytes  # only now, because it is optional

        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            return None if weight.dtype != torch.int8 else BitsAndBytesInt8(module)
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            return None if weight.quant_state is None else BitsAndBytes4Bit(module)
    if type(weight).__module__.startswith("torchao."):
        is_plain_int8 = type(weight).__name__ == "Int8Tensor" and weight.scale.shape == (*weight.shape[:1], 1)
        # Without values, as of an offloaded model, nobody can tell whether there is a shift.
        shift = weight.zero_point if is_plain_int8 else None
        is_shifted = shift is not None and (shift.is_meta or bool(shift.any()))
        readable = is_plain_int8 and not is_shifted and weight.act_quant_kwargs is None
        if readable and isinstance(module, nn.Linear):
            return TorchAOInt8(module)
    # Formats that can only be read have layer classes of their own, or a plain Linear with scales beside the codes.
    sizes = [module.__dict__.get(name) for name in ("in_features", "out_features")]
    is_leaf = not module._modules and all(isinstance(size, int) for size in sizes)
    return QuantizedLayer(module) if is_leaf and _holds_codes(module, weight) else None


def _holds_codes(module: nn.Module, weight: Any) -> bool:
    """Return True if a linear layer's weight, or what it has in place of a weight, consists of codes."""
    if weight is not None:
        return is_coded(weight)
    # GPTQ and AWQ have their codes in integer buffers, HQQ and GGUF in integer parameters.
    tensors = [*module._buffers.values(), *module._parameters.values()]
    return any(is_coded(tensor) for tensor in tensors if tensor is not None)


def is_coded(tensor: Tensor) -> bool:
    """Return True for codes: integers, 8-bit floats, and the classes of tensors by which torchao and quanto decode them."""
    if tensor.dtype == torch.bool:  # a mask
        return False
    is_wrapper = type(tensor).__module__.startswith(("torchao.", "optimum.quanto."))
    return is_wrapper or tensor.element_size() == 1 or not (tensor.is_floating_point() or tensor.is_complex())


def parts_of_codes(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that make up coded weights: codes, and the scales and maps that decode them.

    Some classes of layers leave `requires_grad` of such parameters set, although a step would corrupt the weight.
    """
    parts: set[int] = set()
    for module in model.modules():
        own = _parameters_of_codes(module)
        parts |= {id(parameter) for name, parameter in own.items() if not name.endswith("bias")}
    return parts


def _parameters_of_codes(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters if its weights are codes, and none if integers lie beside a plain weight."""
    own: dict[str, Tensor] = {
        name: parameter for name, parameter in module._parameters.items() if parameter is not None
    }
    weights = [own["weight"]] if "weight" in own else list(own.values())
    return own if any(is_coded(parameter) for parameter in weights) else {}


def is_quantized(model: nn.Module) -> bool:
    """Return True if transformers loaded the model with quantization."""
    return isinstance(model, PreTrainedModel) and bool(getattr(model, "is_quantized", False))


@contextmanager
def training_allowed() -> Iterator[None]:
    """Make Trainer accept a purely quantized model inside this context.

    Trainer refuses such a model because backward passes cannot train it. The context only disables this check: the
    attributes of the model stay as they are.
    """
    check = transformers.trainer.validate_quantization_for_training
    transformers.trainer.validate_quantization_for_training = lambda model: None
    try:
        yield
    finally:
        transformers.trainer.validate_quantization_for_training = check


def stored_tensors(model: nn.Module, tied: bool = False) -> dict[str, Tensor]:
    """Return all tensors that a checkpoint of the model stores, live, by name of their module and name there.

    Args:
        model: the model, quantized or not.
        tied: True gives a tied tensor under each of its names, False under the first one.
    """
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
            if tensor is not None and (tied or id(tensor) not in seen):
                seen.add(id(tensor))
                tensors[f"{prefix}.{name}" if prefix else name] = tensor
    return tensors
