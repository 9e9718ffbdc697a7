"""The header of a log: everything that a replay needs beside the base model and the records.

zo_hf, torch     versions that wrote the log
first_step       0; another number if recording began in the middle of a run, which cannot be replayed
directions       count of numbers in a step's record: q with most estimators and rules
settings         the engine's settings, as in a checkpoint
patterns         zo_target_modules and zo_exclude_modules
optimizer        the optimizer's class, and whether replay can rebuild it
groups           parameter groups: names of their coordinates, and the optimizer's options except the learning rate
base             the model before the first step: its origin, and a hash of its weights
still            names of the coordinates that no probe of the first step has read, which do not move
start            hash of the starting weights saved beside the log; only for an adapter
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zo_hf.engine import ZerothOrder
from zo_hf.offload import Values, offloaded_weights
from zo_hf.parallel.checksum import tensors_hash
from zo_hf.parallel.shards import class_name
from zo_hf.quantization import stored_tensors
from zo_hf.rules import SeededSGD
from zo_hf.subspaces import Adapter, Subspace
from zo_hf.subspaces.peft_methods import base_model
from zo_hf.trajectory.log import TrajectoryError
from zo_hf.untrusted.fields import shown
from zo_hf.version import __version__

OPTIMIZERS: dict[str, type[Optimizer]] = {
    kind.__name__: kind for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, SeededSGD)
}
# Entries of a parameter group that change from step to step, or are no options.
_NO_OPTIONS = ("params", "lr", "initial_lr")


def build_header(
    zo: ZerothOrder, optimizer: Optimizer, from_base: bool = True, base_hash: str | None = None
) -> dict[str, Any]:
    """Return the header of a run that is about to take its next step.

    Args:
        zo: the run's engine.
        optimizer: the run's optimizer.
        from_base: True if the model is, at this moment, the base that a replay will start from.
        base_hash: `weights_hash` of the model; None computes it.
    """
    subspace = zo.subspace
    groups = describe_groups(subspace, optimizer)
    plain = all(_is_plain(value) for group in groups for value in group["options"].values())
    kind = type(optimizer).__name__
    replayable = OPTIMIZERS.get(kind) is type(optimizer) and plain
    return {
        "zo_hf": __version__,
        "torch": torch.__version__,
        "first_step": 0 if from_base else zo.step,
        "directions": zo.numbers,
        "settings": zo.saved_settings(),
        "patterns": {"target": _listed(subspace.target_modules), "exclude": _listed(subspace.exclude_modules)},
        "optimizer": {"kind": kind, "replayable": replayable},
        "groups": groups if plain else [group | {"options": _as_text(group["options"])} for group in groups],
        "base": describe_base(zo.model, subspace, with_weights=from_base, base_hash=base_hash),
        "still": sorted(subspace.still),
        "start": tensors_hash(subspace.start) if from_base and isinstance(subspace, Adapter) else None,
    }


def describe_groups(subspace: Subspace, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the names of every parameter group's coordinates, and the optimizer's options for the group."""
    names = {id(coordinate): name for name, coordinate in subspace.coordinates.items()}
    return [
        {"names": [names[id(p)] for p in group["params"]], "options": options_of(group)}
        for group in optimizer.param_groups
    ]


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter group's options, without the learning rate, in the types that JSON gives back."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in group.items()
        if name not in _NO_OPTIONS
    }


def describe_base(
    model: nn.Module, subspace: Subspace, with_weights: bool, base_hash: str | None = None
) -> dict[str, Any]:
    """Describe a model: its origin, and a hash that identifies its weights bit for bit.

    Args:
        model: the model.
        subspace: its subspace; an adapter's starting weights are left out of the hash.
        with_weights: include the hash, which takes a pass over the weights.
        base_hash: the hash, if it is known already.
    """
    unwrapped: Any = base_model(model)
    config = getattr(unwrapped, "config", None)
    first = next(iter(subspace.sites))
    leave_out = subspace.start.values() if isinstance(subspace, Adapter) else ()
    return {
        "name": getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        "class": class_name(unwrapped),
        "dtype": str(getattr(unwrapped, "dtype", first.parameter.dtype)).removeprefix("torch."),
        "device": first.device.type,
        "quantization": _quantization(config),
        "weights": (base_hash or weights_hash(model, leave_out)) if with_weights else None,
    }


def _quantization(config: Any) -> dict[str, Any] | None:
    """Return the base's quantization settings in the types that JSON gives back; None if it was not quantized."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    described = quantization if isinstance(quantization, dict) else quantization.to_dict()
    plain: dict[str, Any] = json.loads(json.dumps(described, default=str))
    return plain


def weights_hash(model: nn.Module, leave_out: Collection[Tensor] = ()) -> str:
    """Return the SHA-256 over name, dtype, shape and checksum of every parameter and persistent buffer.

    Args:
        model: the model; tied weights count once.
        leave_out: tensors that the hash does not cover.
    """
    left_out = {id(tensor) for tensor in leave_out}
    weights = offloaded_weights(model)
    stored = {name: tensor for name, tensor in stored_tensors(model).items() if id(tensor) not in left_out}
    return tensors_hash(Values(weights, stored))


def check_base(base: Mapping[str, Any], model: nn.Module, leave_out: Collection[Tensor], path: object) -> None:
    """Refuse a model that a log does not begin at; the same weights under another name are the same model.

    Args:
        base: the header's description of the right model.
        model: the model.
        leave_out: tensors that the hash does not cover.
        path: the log, for the message.

    Raises:
        TrajectoryError: the weights differ; the message names the origin of the right model if that differs, too.
    """
    if weights_hash(model, leave_out) == base.get("weights"):
        return
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or None
    if base.get("name") and name and base["name"] != name:
        revision = f" (revision {shown(base['revision'])})" if base.get("revision") else ""
        then = shown(base["name"])
        raise TrajectoryError(
            f"{path} was recorded from '{then}'{revision} and this model is {name!r}; load '{then}'."
        )
    raise TrajectoryError(
        f"{path} was recorded from another model than this: its weights differ; load the same dtype and revision "
        f"({shown(base.get('dtype'))}, {shown(base.get('revision') or 'unknown')}), with any new head as it was initialized or fitted."
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and isfinite(value))


def _as_text(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if _is_plain(value) else repr(value) for name, value in options.items()}


def _listed(pattern: Any) -> Any:
    return pattern if pattern is None or isinstance(pattern, str) else list(pattern)
