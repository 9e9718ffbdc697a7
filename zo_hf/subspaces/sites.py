"""Sites of parameters in a model: the tensors that move, and the modules that use them in their forward."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zo_hf.offload import OffloadedWeight, offloaded_weights
from zo_hf.parallel.absent import is_absent
from zo_hf.parallel.shards import is_sharded
from zo_hf.quantization import QuantizedLayer, parts_of_codes
from zo_hf.subspaces.readers import ParameterReaders

Pattern = str | Sequence[str] | None


@dataclass(frozen=True)
class Site:
    """One parameter of the model.

    Args:
        name: first name of the parameter in `model.named_parameters()`; tied weights have one site.
        parameter: the parameter itself, or the codes of a quantized weight; on the meta device if it is offloaded.
        uses: the modules that read the parameter in their forward, with its name there, dotted if a child holds it.
        layer: reads and writes a quantized weight; None if the parameter is not quantized.
        offloaded: reads and writes a weight that is not on the device that computes; None if the parameter is there.
    """

    name: str
    parameter: nn.Parameter
    uses: tuple[tuple[nn.Module, str], ...]
    layer: QuantizedLayer | None = None
    offloaded: OffloadedWeight | None = None

    @property
    def device(self) -> torch.device:
        """The device that computes with the parameter."""
        return self.parameter.device if self.offloaded is None else self.offloaded.device

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight, even if it is quantized and its codes have another shape."""
        return self.parameter.shape if self.layer is None else self.layer.shape

    @property
    def transposed(self) -> bool:
        """True if the weight is stored as (in, out), as in GPT-2's Conv1D."""
        return any(isinstance(module, Conv1D) for module, _ in self.uses)

    @property
    def matrix_shape(self) -> torch.Size:
        """Shape of the whole parameter `as_matrix`, even if this process holds only a part of it."""
        return self.as_matrix(torch.empty(self.shape, device="meta")).shape

    def as_held(self, value: Tensor, parameter: Tensor) -> Tensor:
        """Return a value of the parameter, of its shape, as a module holds it: some hold a transposed view."""
        return value.t() if _is_transposed_view(parameter, self.parameter) else value

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """View a tensor of the parameter's shape as a matrix, (out, in).

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
    """Find the trainable floating-point parameters of `model` that the patterns select, in the model's order.

    Args:
        model: the model to search.
        target: a regular expression that must match a whole parameter or module name, or a list of endings of such
            names (PEFT's convention). None selects everything.
        exclude: parameters to leave out, in the same form.
        among: if given, only these parameters can be selected, e.g. those of an optimizer.
        quantized: quantized layers with weights that may move too, although torch cannot train them.

    Raises:
        ValueError: no parameter is selected, or a selected parameter cannot be perturbed.
    """
    allowed = None if among is None else {id(parameter) for parameter in among}
    readers = ParameterReaders(model)
    uses: dict[int, list[tuple[nn.Module, str]]] = {}
    first: dict[int, tuple[str, nn.Parameter]] = {}
    layers: dict[int, QuantizedLayer] = {}
    offloaded = {id(weight.placeholder): weight for weight in offloaded_weights(model).values()}
    for module_name, module, attribute, parameter, layer in _trainable(model, quantized or {}):
        if allowed is not None and id(parameter) not in allowed:
            continue
        if layer is not None:
            layers[id(parameter)] = layer
        name = f"{module_name}.{attribute}" if module_name else attribute
        key = next((k for k, (_, p) in first.items() if _is_transposed_view(parameter, p)), id(parameter))
        first.setdefault(key, (name, parameter))
        uses.setdefault(key, []).extend(readers.of(module, attribute))
    sites = [
        Site(name, parameter, tuple(uses[key]), layers.get(key), offloaded.get(id(parameter)))
        for key, (name, parameter) in first.items()
        if (target is None or _matches(name, target)) and (exclude is None or not _matches(name, exclude))
    ]
    if not sites:
        way_out = (
            f"choose among names like {next(iter(first.values()))[0]!r}" if first else "make a parameter trainable"
        )
        raise ValueError(
            f"zo_target_modules={target!r} with zo_exclude_modules={exclude!r} selects no trainable parameter of "
            f"{type(model).__name__}; {way_out}."
        )
    return _without_what_cannot_move(model, sites, chosen=target is not None)


def _trainable(
    model: nn.Module, quantized: Mapping[nn.Module, QuantizedLayer]
) -> Iterator[tuple[str, nn.Module, str, nn.Parameter, QuantizedLayer | None]]:
    """Yield the parameters that can move, wherever a module holds them: tied ones several times.

    Yields:
        The module's name, the module, the parameter's name there, the parameter, and the layer of a quantized weight.
    """
    coded = parts_of_codes(model)
    for module_name, module in model.named_modules():
        parameters, layer = dict(module._parameters), quantized.get(module)
        if layer is not None and parameters.get("weight") is None:
            parameters["weight"] = layer.stand_in
        for attribute, parameter in parameters.items():
            if parameter is None:
                continue
            if layer is not None and attribute == "weight":
                yield module_name, module, attribute, parameter, layer
                continue
            is_trainable = parameter.requires_grad and parameter.is_floating_point() and id(parameter) not in coded
            if is_trainable and (parameter.numel() or layer is not None):
                yield module_name, module, attribute, parameter, None


def is_decayed(site: Site) -> bool:
    """Return True if weight decay applies to a site: to matrices outside of normalization layers, of any name."""
    return len(site.shape) >= 2 and not any(_is_normalization(module) for module, _ in site.uses)


def _is_normalization(module: nn.Module) -> bool:
    kinds = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    # Every architecture in transformers has an RMSNorm class of its own (LlamaRMSNorm, T5LayerNorm, ...).
    return isinstance(module, kinds) or type(module).__name__.endswith("Norm")


def _matches(name: str, pattern: str | Sequence[str]) -> bool:
    names = (name, name.rpartition(".")[0])
    if isinstance(pattern, str):
        return any(re.fullmatch(pattern, candidate) for candidate in names)
    return any(candidate == end or candidate.endswith(f".{end}") for candidate in names for end in pattern)


def _without_what_cannot_move(model: nn.Module, sites: list[Site], chosen: bool) -> list[Site]:
    """Leave out the parameters that their own modules overwrite.

    Args:
        model: the model.
        sites: the sites that the patterns select.
        chosen: True if the user has selected them; one that cannot move is then refused.

    Raises:
        ValueError: a chosen parameter cannot move, no parameter remains, or the user can easily change the reason.
    """
    attentions: list[Any] = [
        module for module in model.modules() if isinstance(getattr(module, "base_layer", None), nn.MultiheadAttention)
    ]
    adapters_of_attention = {m for layer in attentions for m in layer.modules()}
    stay: dict[str, str] = {}
    for site in sites:
        for module, _ in site.uses:
            if module in adapters_of_attention:
                stay[site.name] = "PEFT writes it into the attention's weights"
            elif isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
                stay[site.name] = "an embedding with max_norm writes its weight in its forward"
            elif site.parameter.is_meta and site.offloaded is None:
                raise _cannot_move(
                    site.name, "it is on the meta device and has no value; load the model with its weights"
                )
    movable = [site for site in sites if site.name not in stay]
    if stay and (chosen or not movable):
        raise _cannot_move(*next(iter(stay.items())))
    return movable


def require_contiguous(sites: Iterable[Site]) -> None:
    """Refuse parameters that cannot be written a slice of their memory at a time.

    Raises:
        ValueError: the memory of a parameter is not contiguous.
    """
    for site in sites:
        if site.layer is None and not site.parameter.is_contiguous() and not is_absent(site.parameter):
            raise _cannot_move(site.name, "its memory is not contiguous; call .contiguous() on it first")


def _is_transposed_view(parameter: Tensor, other: Tensor) -> bool:
    """Return True if a matrix is the transpose of another in the same memory, as PEFT ties adapters of embeddings."""
    if parameter is other or parameter.ndim != 2 or is_sharded(parameter) or parameter.is_contiguous():
        return False
    return (
        parameter.shape == other.shape[::-1]
        and not is_sharded(other)
        and parameter.data_ptr() == other.data_ptr() != 0
        and parameter.stride() == other.stride()[::-1]
    )


def _cannot_move(name: str, reason: str) -> ValueError:
    return ValueError(f"{name} cannot be perturbed: {reason}; leave it out with zo_exclude_modules.")


def coordinate_dtype(parameter: Tensor) -> torch.dtype:
    """Return float32, or float64 for a float64 parameter, so that small updates survive in a model of any dtype."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
