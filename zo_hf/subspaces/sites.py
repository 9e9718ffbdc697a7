"""Where a model's parameters sit: which tensors move, and whose forward uses them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zo_hf.quantization import QuantizedLayer
from zo_hf.subspaces.owners import Owners

Pattern = str | Sequence[str] | None


@dataclass(frozen=True)
class Site:
    """One parameter of the model.

    Args:
        name: its first name in `model.named_parameters()`; tied weights have one site.
        parameter: the parameter itself.
        uses: every module whose forward reads it, with its name there; dotted where a child module holds it.
        layer: what reads and writes it where it is quantised, and `parameter` only its codes.
    """

    name: str
    parameter: nn.Parameter
    uses: tuple[tuple[nn.Module, str], ...]
    layer: QuantizedLayer | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the weight, also where it is quantised and its codes have another shape."""
        return self.parameter.shape if self.layer is None else self.layer.shape

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (in, out), as GPT-2's Conv1D does."""
        return any(isinstance(module, Conv1D) for module, _ in self.uses)

    @property
    def matrix_shape(self) -> torch.Size:
        """Of the whole parameter `as_matrix`, also where this process holds only a part of it."""
        return self.as_matrix(torch.empty(self.shape, device="meta")).shape

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """A view of `tensor`, shaped like the parameter, as a matrix (out, in).

        Convolution kernels keep their first dimension, stacks of expert matrices their last one.
        """
        if self.transposed:
            return tensor.t()
        if any(isinstance(module, nn.modules.conv._ConvNd) for module, _ in self.uses):
            return tensor.flatten(1)
        return tensor.flatten(0, -2)


def find_sites(
    model: nn.Module,
    target: Pattern = None,
    exclude: Pattern = None,
    among: Iterable[Tensor] | None = None,
    quantized: Mapping[nn.Module, QuantizedLayer] | None = None,
) -> list[Site]:
    """The trainable floating-point parameters of `model` that the patterns select, in the model's order.

    Args:
        target: a regular expression that must match a whole parameter or module name, or a list of names of which one
            must be the end of it (PEFT's convention); None selects everything.
        exclude: the same, for what is left out.
        among: only these parameters, e.g. those an optimizer was built for; None means all.
        quantized: quantised layers whose weights may move too, though to torch they are not trainable.

    Raises:
        ValueError: nothing is selected, or a selected parameter cannot be perturbed inside its module's forward.
    """
    allowed = None if among is None else {id(parameter) for parameter in among}
    owners = Owners(model)
    uses: dict[int, list[tuple[nn.Module, str]]] = {}
    first: dict[int, tuple[str, nn.Parameter]] = {}
    layers: dict[int, QuantizedLayer] = {}
    quantized = quantized or {}
    for module_name, module in model.named_modules():
        parameters = dict(module._parameters)
        if module in quantized and parameters.get("weight") is None:
            parameters["weight"] = quantized[module].stand_in
        for attribute, parameter in parameters.items():
            if parameter is None:
                continue
            if attribute == "weight" and module in quantized:
                layers[id(parameter)] = quantized[module]
            elif not parameter.requires_grad or not parameter.is_floating_point():
                continue
            if allowed is not None and id(parameter) not in allowed:
                continue
            name = f"{module_name}.{attribute}" if module_name else attribute
            first.setdefault(id(parameter), (name, parameter))
            uses.setdefault(id(parameter), []).extend(owners.of(module, attribute))
    sites = [
        Site(name, parameter, tuple(uses[key]), layers.get(key))
        for key, (name, parameter) in first.items()
        if (target is None or _matches(name, target)) and (exclude is None or not _matches(name, exclude))
    ]
    if not sites:
        raise ValueError(
            f"zo_target_modules={target!r} with zo_exclude_modules={exclude!r} selects no trainable parameter of "
            f"{type(model).__name__}; names look like {next(iter(first.values()))[0] if first else 'nothing here'!r}."
        )
    _refuse_what_forward_bypasses(model, sites)
    return sites


def is_decayed(site: Site) -> bool:
    """Whether weight decay applies: to matrices, and to nothing in a normalisation layer, whatever its name is."""
    return len(site.shape) >= 2 and not any(_is_normalisation(module) for module, _ in site.uses)


def _is_normalisation(module: nn.Module) -> bool:
    kinds = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    # Every architecture in transformers has an RMSNorm class of its own (LlamaRMSNorm, T5LayerNorm, ...).
    return isinstance(module, kinds) or type(module).__name__.endswith("Norm")


def _matches(name: str, pattern: str | Sequence[str]) -> bool:
    names = (name, name.rpartition(".")[0])
    if isinstance(pattern, str):
        return any(re.fullmatch(pattern, candidate) for candidate in names)
    return any(candidate == end or candidate.endswith(f".{end}") for candidate in names for end in pattern)


def _refuse_what_forward_bypasses(model: nn.Module, sites: list[Site]) -> None:
    wrappers: list[Any] = [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]
    adapters_of_parameters = {m for wrapper in wrappers for m in (*wrapper.lora_A.values(), *wrapper.lora_B.values())}
    attentions: list[Any] = [
        module for module in model.modules() if isinstance(getattr(module, "base_layer", None), nn.MultiheadAttention)
    ]
    adapters_of_attention = {m for layer in attentions for m in layer.modules()}
    for site in sites:
        for module, _ in site.uses:
            reason = None
            if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear | nn.MultiheadAttention):
                reason = "torch's MultiheadAttention reads it outside of any module's forward"
            elif module in adapters_of_parameters:
                reason = "PEFT adds this LoRA to a parameter, e.g. of experts, outside of any module's forward"
            elif module in adapters_of_attention:
                reason = "PEFT writes it into the attention's weights"
            elif isinstance(module, nn.RNNBase):
                reason = "torch's fused recurrent layers read it from a flattened buffer"
            elif isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
                reason = "an embedding with max_norm writes its weight in its forward"
            elif site.layer is None and not site.parameter.is_contiguous():
                reason = "its memory is not contiguous; call .contiguous() on it first"
            elif site.parameter.is_meta:
                reason = "it is offloaded to the meta device; load the model without offloading"
            if reason:
                raise ValueError(f"{site.name} cannot be perturbed: {reason}; leave it out with zo_exclude_modules.")


def coordinate_dtype(parameter: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 model: small updates must survive, whatever the weights' dtype."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
