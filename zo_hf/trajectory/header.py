"""What a log says about its run: everything that a replay needs beside the base model.

zo_hf, torch     versions that wrote it
first_step       0; another number where recording began in the middle of a run, which cannot be replayed
directions       how many numbers a step is recorded as: q with most estimators and rules
settings         of the engine, as a checkpoint has them
patterns         zo_target_modules and zo_exclude_modules
optimizer        its kind, and whether replay can rebuild it
groups           of parameters: the names of their coordinates and the optimizer's options, without the learning rate
base             the model before the first step: where it came from, and a hash of its weights
start            hash of the starting weights saved beside the log; only for an adapter
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import zo_hf
from zo_hf import checkpoint
from zo_hf.checksum import tensor_checksum
from zo_hf.model_setup import base_model
from zo_hf.optimizers import SeededSGD
from zo_hf.quantization import stored_tensors
from zo_hf.subspaces import Adapter, Subspace
from zo_hf.trajectory.log import TrajectoryError
from zo_hf.zeroth_order import ZerothOrder

OPTIMIZERS: dict[str, type[Optimizer]] = {
    kind.__name__: kind for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, SeededSGD)
}
# What changes from step to step, or is not an option.
_NO_OPTIONS = ("params", "lr", "initial_lr")


def build_header(
    zo: ZerothOrder, optimizer: Optimizer, from_base: bool = True, base_hash: str | None = None
) -> dict[str, Any]:
    """The header of a run that is about to take its next step.

    Args:
        from_base: whether the model is, at this moment, the base that a replay will start from.
        base_hash: its `weights_hash`, if that is known; else it is computed.
    """
    subspace = zo.subspace
    groups = describe_groups(subspace, optimizer)
    plain = all(_is_plain(value) for group in groups for value in group["options"].values())
    kind = type(optimizer).__name__
    replayable = OPTIMIZERS.get(kind) is type(optimizer) and plain
    return {
        "zo_hf": zo_hf.__version__,
        "torch": torch.__version__,
        "first_step": 0 if from_base else zo.step,
        "directions": zo.numbers,
        "settings": checkpoint.settings(zo),
        "patterns": {"target": _listed(subspace.target_modules), "exclude": _listed(subspace.exclude_modules)},
        "optimizer": {"kind": kind, "replayable": replayable},
        "groups": groups if plain else [group | {"options": _as_text(group["options"])} for group in groups],
        "base": describe_base(zo.model, subspace, with_weights=from_base, base_hash=base_hash),
        "start": tensors_hash(subspace.start) if from_base and isinstance(subspace, Adapter) else None,
    }


def describe_groups(subspace: Subspace, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Every parameter group's coordinates, by name, and the optimizer's options for it."""
    names = {id(coordinate): name for name, coordinate in subspace.coordinates.items()}
    return [
        {"names": [names[id(p)] for p in group["params"]], "options": options_of(group)}
        for group in optimizer.param_groups
    ]


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's options as they are after a way through JSON, without the learning rate."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in group.items()
        if name not in _NO_OPTIONS
    }


def describe_base(
    model: nn.Module, subspace: Subspace, with_weights: bool, base_hash: str | None = None
) -> dict[str, Any]:
    """Where a model came from, and which it is, bit for bit.

    Args:
        with_weights: include the hash of its weights, which takes a pass over them.
        base_hash: that hash, if it is known already.
    """
    unwrapped: Any = base_model(model)
    config = getattr(unwrapped, "config", None)
    first = next(iter(subspace.sites)).parameter
    leave_out = subspace.start.values() if isinstance(subspace, Adapter) else ()
    return {
        "name": getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        "class": type(unwrapped).__name__,
        "dtype": str(getattr(unwrapped, "dtype", first.dtype)).removeprefix("torch."),
        "device": first.device.type,
        "quantization": _quantization(config),
        "weights": (base_hash or weights_hash(model, leave_out)) if with_weights else None,
    }


def _quantization(config: Any) -> dict[str, Any] | None:
    """How the base was quantised when it was loaded, if it was, after a way through JSON."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    described = quantization if isinstance(quantization, dict) else quantization.to_dict()
    plain: dict[str, Any] = json.loads(json.dumps(described, default=str))
    return plain


def weights_hash(model: nn.Module, leave_out: Collection[Tensor] = ()) -> str:
    """SHA-256 over name, dtype, shape and checksum of every parameter and persistent buffer; tied weights count once.

    Args:
        leave_out: tensors that are not part of it.
    """
    left_out = {id(tensor) for tensor in leave_out}
    return tensors_hash({name: t for name, t in stored_tensors(model).items() if id(t) not in left_out})


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and checksum of every tensor, whatever their order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        line = f"{name} {tensor.dtype} {list(tensor.shape)} {tensor_checksum(tensor):016x}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def check_base(base: Mapping[str, Any], model: nn.Module, leave_out: Collection[Tensor], path: object) -> None:
    """Refuse a model that is not the one a log begins at; the same weights under another name are the same model.

    Raises:
        TrajectoryError: its weights differ; the message names where the right one came from, if it is from elsewhere.
    """
    if weights_hash(model, leave_out) == base.get("weights"):
        return
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or None
    if base.get("name") and name and base["name"] != name:
        revision = f" (revision {base['revision']})" if base.get("revision") else ""
        raise TrajectoryError(
            f"{path} was recorded from {base['name']!r}{revision} and this model is {name!r}; load that one."
        )
    raise TrajectoryError(
        f"this model is not the one that {path} was recorded from: its weights differ; load it in the same dtype and "
        f"revision ({base.get('dtype')}, {base.get('revision') or 'unknown'}), with any new head as it was initialised."
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and isfinite(value))


def _as_text(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if _is_plain(value) else repr(value) for name, value in options.items()}


def _listed(pattern: Any) -> Any:
    return pattern if pattern is None or isinstance(pattern, str) else list(pattern)
