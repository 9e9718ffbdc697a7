"""Reading a checkpoint's weights into the model of a run, in place, with a check that all of them were read.

transformers saves many models under other names than their modules': a renamed prefix, the experts of a layer one by one.
`load_state_dict` would leave such weights as they are. Here each tensor of the file takes the way that `from_pretrained`
gives it, by the conversions that transformers has for the model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from zo_hf.checkpoint import holds_adapter
from zo_hf.offload import OffloadedWeight, is_offloaded, offloaded_weights
from zo_hf.parallel.absent import is_absent
from zo_hf.parallel.shards import local_part, part_of, reshard
from zo_hf.quantization import is_quantized, stored_tensors
from zo_hf.untrusted import plain_json
from zo_hf.untrusted.fields import is_text

_Files = Mapping[str, Callable[[], Tensor]]
# Targets of a group of tensors in the file, the converter that makes the ones from the others, and the group: each
# tensor's name in the file, with the pattern of the converter that it matches. Without a converter the group is one tensor.
_Group = tuple[list[str], WeightConverter | None, list[tuple[str, str]]]


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights of a checkpoint into a model of the same architecture and format, in place.

    Args:
        model: the model to write to, quantized or not, sharded or not.
        folder: checkpoint folder with safetensors files, or with those of `torch.save`.

    Raises:
        ValueError: the folder has no weights, lacks one of the model's, or has it in another shape or format; the message
            names the first one. Nothing has been written if the file has no part of a weight.
    """
    reshard(model)
    offloaded = {id(weight.placeholder): weight for weight in offloaded_weights(model).values()}
    parts = stored_tensors(model, tied=True)
    exact = is_quantized(model)
    read: set[int] = set()
    with _opened(folder) as files:
        for targets, converter, group in _plan(model, parts, list(files), folder):
            values: dict[str, Any]
            if converter is None:
                values = {targets[0]: files[group[0][0]]()}
            else:
                for name, pattern in group:
                    converter.add_tensor(targets[0], name, pattern, files[name]())
                try:
                    values = converter.convert(targets[0], model=model, config=model.config)
                except (RuntimeError, ValueError, KeyError, IndexError) as error:
                    raise _unfit(targets[0], folder) from error
            for name in values.keys() & parts.keys():
                value = values[name][0] if isinstance(values[name], list) else values[name]
                weight = offloaded.get(id(parts[name]))
                _copy(parts[name] if weight is None else weight, value, name, folder, exact)
                read.add(id(parts[name]))
    _refuse_missing(model, parts, read, folder)


def load_adapters(model: Any, folder: Path) -> None:
    """Copy every adapter of a checkpoint into a model that has adapters of these names, which stay as active as they are.

    Args:
        model: a PEFT model, or a model with adapters from its own `add_adapter`.
        folder: checkpoint folder.

    Raises:
        ValueError: a trainable weight of the model is not in the folder; the message names the first one.
    """
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in model.peft_config:
        source = folder / name if holds_adapter(folder / name) else folder
        missing = {key for key in trainable if name in key.split(".")}
        if source != folder or (holds_adapter(folder) and (name == "default" or len(model.peft_config) == 1)):
            # PEFT would place an offloaded model anew, without the values of its weights.
            if isinstance(model, PeftModel) and not is_offloaded(model):
                result = model.load_adapter(str(source), name, is_trainable=True)
            else:
                saved = load_peft_weights(str(source), device="cpu")
                if not isinstance(model, PeftModel):
                    saved = {key.removeprefix("base_model.model."): tensor for key, tensor in saved.items()}
                result = set_peft_model_state_dict(model, saved, name)
            # Layers may share a tensor, which the file then holds under one of its names.
            parameters = dict(model.named_parameters(remove_duplicate=False))
            # PEFT reads prompts apart from the others, and still counts them as missing.
            absent = {key for key in result.missing_keys if not key.startswith("prompt_encoder.")}
            read = {id(parameter) for key, parameter in parameters.items() if key not in absent}
            missing = {key for key in missing & absent if id(parameters[key]) not in read}
        if missing:
            raise ValueError(f"{folder} has no {min(missing)}; give a checkpoint of a model with the same adapters.")


def _plan(model: Any, parts: Mapping[str, Tensor], names: Sequence[str], folder: Path) -> list[_Group]:
    """Return the groups that fill all parts of the model.

    Raises:
        ValueError: a part cannot be filled.
    """
    best: list[_Group] = []
    fewest = len(parts) + 1
    for conversions in _conversions(model):
        groups = _groups(parts, names, conversions, getattr(model, "base_model_prefix", None))
        filled = {id(parts[target]) for targets, *_ in groups for target in targets if target in parts}
        missing = len(_missing(model, parts, filled))
        if missing < fewest:
            best, fewest = groups, missing
        if not missing:
            return groups
    _refuse_missing(model, parts, {id(parts[t]) for targets, *_ in best for t in targets if t in parts}, folder)
    return best


def _missing(model: nn.Module, parts: Mapping[str, Tensor], read: set[int]) -> list[str]:
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return [name for name, tensor in parts.items() if id(tensor) not in read and name not in ignored]


def _refuse_missing(model: nn.Module, parts: Mapping[str, Tensor], read: set[int], folder: Path) -> None:
    missing = _missing(model, parts, read)
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}; load weights of the same model in the same format.")


def _conversions(model: nn.Module) -> Iterator[list[WeightTransform]]:
    """Yield the sets of conversions with which the model may have been saved, the likeliest first."""
    if isinstance(model, PreTrainedModel):
        loaded_with = getattr(model, "_weight_conversions", None)  # transformers reverses these when it saves
        if loaded_with is not None:
            yield loaded_with
        # A model that was not loaded is saved with these reversed.
        yield [
            one for one in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(one, PrefixChange)
        ]
        yield get_model_conversion_mapping(model)
    yield []


def _groups(
    parts: Mapping[str, Tensor], names: Sequence[str], conversions: list[WeightTransform], prefix: str | None
) -> list[_Group]:
    """Return the groups by which tensors of a file fill parts of the model, as `from_pretrained` finds them."""
    conversions = copy.deepcopy(conversions)  # they remember what they have matched
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    of_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    groups: dict[str, _Group] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, dict(parts))
        if target not in parts and name in parts:
            target, pattern = name, None
        if target not in parts:
            continue
        if pattern is None:
            groups[target] = [target], None, [(name, name)]
        elif target in groups:
            groups[target][2].append((name, pattern))
        else:
            converter = copy.deepcopy(of_pattern[pattern])
            first = converter.target_patterns[0]
            targets = [target.replace(first, one, 1) for one in converter.target_patterns]
            groups[target] = targets, converter, [(name, pattern)]
    return list(groups.values())


def _copy(part: Tensor | OffloadedWeight, value: Tensor, name: str, folder: Path, exact: bool) -> None:
    like = part.placeholder if isinstance(part, OffloadedWeight) else part
    if value.shape != like.shape or (exact and value.dtype != like.dtype):
        raise _unfit(name, folder)
    if isinstance(part, OffloadedWeight):
        part.write(value)
    elif not (part.is_meta or is_absent(part)):  # else the first process sends them later, or another one holds them
        local_part(part)[0].copy_(part_of(value, part))


def _unfit(name: str, folder: Path) -> ValueError:
    return ValueError(
        f"{name} in {folder} is not complete, or in another format; load weights of the same model in the same format."
    )


@contextmanager
def _opened(folder: Path) -> Iterator[_Files]:
    """Yield a function for every tensor of a checkpoint that reads it, by its name in the file."""
    with ExitStack() as stack:
        tensors: dict[str, Callable[[], Tensor]] = {}
        for path in _paths(folder):
            if path.suffix == ".safetensors":
                file = stack.enter_context(safe_open(path, "pt"))
                tensors |= {name: functools.partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
            else:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                tensors |= {name: functools.partial(state.get, name) for name in state}
        yield tensors


def _paths(folder: Path) -> list[Path]:
    for index in (folder / SAFE_WEIGHTS_INDEX_NAME, folder / WEIGHTS_INDEX_NAME):
        if index.exists():
            return [folder / name for name in _listed(index)]
    for path in (folder / SAFE_WEIGHTS_NAME, folder / WEIGHTS_NAME):
        if path.exists():
            return [path]
    raise ValueError(f"{folder} has no {SAFE_WEIGHTS_NAME}; give a checkpoint folder with weights.")


def _listed(index: Path) -> list[str]:
    """Return the names of the files, in the folder of the index, among which the weights are divided."""
    try:
        content = plain_json.read(index)
    except (OSError, ValueError) as error:
        raise ValueError(f"{index} cannot be read; give a checkpoint folder with weights.") from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(is_text(name) and Path(name).name == name for name in names.values()):
        raise ValueError(f"{index} does not list files beside it; give a checkpoint folder with weights.")
    return sorted(set(names.values()))
