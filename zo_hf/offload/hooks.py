"""The weights that accelerate's hooks load and put away, as `dispatch_model`, `cpu_offload` and `disk_offload` set them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, named_module_tensors
from torch import Tensor, nn
from transformers import PreTrainedModel

from zo_hf.offload.weight import OffloadedWeight
from zo_hf.quantization import is_coded


class WeightsOfHook(Mapping[str, Tensor]):
    """The present values of a hook's weights, by their names in its module; accelerate and transformers read them here."""

    def __init__(self, weights: dict[str, OffloadedWeight]) -> None:
        self.weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name].value()

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """Return the hook that loads and puts away the weights of a module; None if they stay where they are."""
    hook = module.__dict__.get("_hf_hook")
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((h for h in hooks if isinstance(h, AlignDevicesHook) and h.weights_map is not None), None)


def is_offloaded(model: nn.Module) -> bool:
    """Return True if accelerate keeps weights of the model off the device that computes."""
    return any(offload_hook(module) is not None for module in model.modules())


def offloaded_weights(model: nn.Module) -> dict[str, OffloadedWeight]:
    """Return the offloaded weights of a model, by each of their names. From the first call on, they can be written.

    accelerate replaces the parameters of a module whenever it puts them away, and parameters that were tied no longer are
    one. A call outside of a forward pass puts back those that were there at the first call.

    Raises:
        ValueError: a weight is offloaded, and a weight that is tied to it is not, or it has no value where accelerate reads
            it; the message names them.
    """
    hooks = {module: hook for module in model.modules() if (hook := offload_hook(module)) is not None}
    if not hooks:
        return {}
    known: dict[int, OffloadedWeight] = {}
    for module, hook in hooks.items():
        if not isinstance(hook.weights_map, WeightsOfHook):
            _adopt(module, hook, known)
    tables = _tables(model, hooks)
    _join_tied(model, tables)
    named = {name: table[local] for name, (table, local) in tables.items()}
    for name, weight in named.items():
        if not weight.has_value:
            raise ValueError(
                f"{name} is not in the files of the model, and device_map offloads it to the disk; give it 'cpu' or the device "
                "that computes in device_map."
            )
        for module, attribute in weight.places:
            put(module, attribute, weight.placeholder)
    return named


def held(module: nn.Module, attribute: str) -> Tensor | None:
    """Return what a module holds as its parameter or buffer of this name, without a class's own way to read it.

    It holds nothing there while the parameter is computed from another one, see `torch.nn.utils.parametrize`.
    """
    parameter = module._parameters.get(attribute)
    return module._buffers.get(attribute) if parameter is None else parameter


def put(module: nn.Module, attribute: str, tensor: Tensor) -> None:
    """Let a module hold a tensor as its parameter or buffer of this name, without any of torch's checks."""
    table: Any = module._parameters if attribute in module._parameters else module._buffers
    table[attribute] = tensor


def computing_device(module: nn.Module, tensor: Tensor) -> torch.device:
    """Return the device on which a module computes with a tensor of its own, which may be offloaded."""
    hook = offload_hook(module) if tensor.is_meta else None
    return tensor.device if hook is None else _device_of(hook)


def computing_devices(model: nn.Module) -> list[torch.device]:
    """Return the devices on which a model computes with its parameters, in the model's order."""
    held_in = ((module, p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return list(dict.fromkeys(computing_device(module, parameter) for module, parameter in held_in))


def check_values(model: nn.Module) -> None:
    """Refuse a model with parameters that have no value anywhere.

    Raises:
        ValueError: it has one; the message names it and the way out.
    """
    weights = offloaded_weights(model)
    missing = next((n for n, p in model.named_parameters() if p.is_meta and n not in weights), None)
    if missing is None:
        return
    if weights:
        raise ValueError(
            f"{missing} was made for a layer whose weights device_map offloads, and has no value; wrap the model with "
            "zo_hf.offload.get_peft_model, which takes the arguments of PEFT's, and add no adapter later."
        )
    raise ValueError(
        f"{missing} is on the meta device and has no value; load the model by from_pretrained, with device_map=... and "
        "offload_folder=... if its weights do not fit in memory."
    )


def _adopt(module: nn.Module, hook: AlignDevicesHook, known: dict[int, OffloadedWeight]) -> None:
    """Make a hook read its module's weights as they are now, and not as they were when it was made."""
    found: dict[str, OffloadedWeight] = {}
    source, prefix, loader = _read_by(hook.weights_map)
    tensors = named_module_tensors(
        module, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
    )
    buffers = {name for name, _ in module.named_buffers()}
    for name, tensor in tensors:
        if name not in buffers and is_coded(tensor):
            raise ValueError(
                f"{prefix}{name} is quantized, and device_map offloads it; give device_map one device for all of the model, or "
                "load it without quantization."
            )
        weight = known.get(id(tensor))
        if weight is None:
            key = prefix + name
            in_memory = loader is None or key in loader.state_dict
            folder = None if loader is None else loader.save_folder
            folder = None if folder is None else str(folder)
            weight = OffloadedWeight(tensor, source, key, _device_of(hook), in_memory, folder)
            weight.has_value = loader is None or in_memory or key in loader.index
            known[id(tensor)] = weight
        path, _, attribute = name.rpartition(".")
        weight.places.append((module.get_submodule(path), attribute))
        found[name] = weight
    hook.weights_map = WeightsOfHook(found)


def _device_of(hook: AlignDevicesHook) -> torch.device:
    """Return the device that a hook loads weights onto, with its index, as tensors have it."""
    named = hook.execution_device
    return torch.device("cuda", torch.cuda.current_device()) if str(named) == "cuda" else torch.device(named)


def _read_by(source: Any) -> tuple[Mapping[str, Tensor], str, OffloadedWeightsLoader | None]:
    """Return the mapping that a hook reads, the prefix of its names there, and the mapping again if it may read the disk."""
    prefix = ""
    while isinstance(source, PrefixedDataset):
        source, prefix = source.dataset, source.prefix + prefix
    if not isinstance(source, OffloadedWeightsLoader):
        return source, prefix, None
    source.device = None  # it would read onto the device that computes, and not wait for room there
    return source, prefix, source


def _tables(
    model: nn.Module, hooks: Mapping[nn.Module, AlignDevicesHook]
) -> dict[str, tuple[dict[str, OffloadedWeight], str]]:
    """Return the table that holds each offloaded weight, and its name there, by its name in the model."""
    names = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    return {
        names[module] + local: (hook.weights_map.weights, local)
        for module, hook in hooks.items()
        for local in hook.weights_map.weights
    }


def _join_tied(model: nn.Module, tables: Mapping[str, tuple[dict[str, OffloadedWeight], str]]) -> None:
    """Let weights that are tied be one weight in the tables of `_tables`.

    Raises:
        ValueError: one of two is offloaded, and the other is not.
    """
    for target, source in _ties(model):
        if (target in tables) != (source in tables):
            raise ValueError(
                f"device_map puts {target} and {source} on different devices, and they share one weight; give both the same device."
            )
        if target not in tables:
            continue
        (table, name), (other_table, other_name) = tables[target], tables[source]
        if table[name] is not other_table[other_name]:
            other_table[other_name].places += table[name].places
            table[name] = other_table[other_name]


def _ties(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the names of parameters that a model of transformers ties, in pairs."""
    present = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            for pair in (module.all_tied_weights_keys or {}).items():
                target, source = (f"{prefix}.{name}" if prefix else name for name in pair)
                if {target, source} <= present:  # an adapter's layer around one has another name
                    yield target, source
