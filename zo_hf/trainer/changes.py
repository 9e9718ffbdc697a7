"""Changes of a resumed run: its method and its model must be the same, and other training arguments are taken over.

A checkpoint's zo_state.json describes its run under "run". A change of the method, the optimizer or the model would end the
trajectory that the log describes, so it is refused. Arguments such as the number of steps, the rate and the batch size may
change: the resumed run goes on with its own, and one line says which.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import has_length

from zo_hf import checkpoint
from zo_hf.engine import ZerothOrder
from zo_hf.parallel.shards import class_name, is_divided_model
from zo_hf.subspaces import Adapter, LowRank
from zo_hf.subspaces.peft_methods import base_model, is_peft
from zo_hf.trainer.config import ZOConfig
from zo_hf.trajectory.header import describe_groups, weights_hash

logger = logging.getLogger(__name__)

#: Arguments that have an effect on later steps, or on their number, and that a resumed run takes over.
_ARGUMENTS = (
    "max_steps",
    "num_train_epochs",
    "zo_max_forward_passes",
    "zo_max_time",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "data_seed",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "ignore_data_skip",
    "remove_unused_columns",
    "bf16",
    "fp16",
    "tf32",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "average_tokens_across_devices",
    "zo_parallel",
    "zo_batched_probes",
    "zo_cuda_graph",
    "zo_common_random_numbers",
    "zo_kernels",
    "zo_stability_action",
)
#: Those on which a schedule of the learning rate depends; the number of steps may follow from the data.
_OF_SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "number of steps")
#: Entries of a PEFT configuration without effect on what the adapter computes.
_NOT_OF_ADAPTER = (
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "task_type",
)


def describe(
    zo: ZerothOrder,
    optimizer: Optimizer,
    args: ZOConfig,
    steps: int,
    train_dataset: Any,
) -> dict[str, Any]:
    """Describe a run that begins or is about to be resumed, in the types that JSON gives back.

    Args:
        zo: the engine.
        optimizer: the optimizer of the coordinates, with the rates that the run begins with.
        args: the run's arguments.
        steps: number of steps of the run.
        train_dataset: the training data.
    """
    rates = rates_of(optimizer)
    values = {name: getattr(args, name) for name in _ARGUMENTS if name in dir(args)}
    values["learning_rate"] = list(rates) if len(set(rates)) > 1 else rates[0]
    values["len(train_dataset)"] = len(train_dataset) if has_length(train_dataset) else None
    values["number of steps"] = steps
    groups = describe_groups(zo.subspace, optimizer)
    names = "\n".join(name for group in groups for name in group["names"])
    described = {
        "arguments": values,
        "optimizer": {"optim": type(optimizer).__name__, "groups": [group["options"] for group in groups]},
        "patterns": {
            "zo_target_modules": zo.subspace.target_modules,
            "zo_exclude_modules": zo.subspace.exclude_modules,
        },
        "names": hashlib.sha256(names.encode()).hexdigest(),
        **_describe_model(zo.model),
    }
    return _plain(described)


def rates_of(optimizer: Optimizer) -> list[float]:
    """Return the learning rate of every parameter group at the beginning of a run."""
    return [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]


def _describe_model(model: nn.Module) -> dict[str, Any]:
    inner: Any = base_model(model)
    # An adapter's own weights may have another dtype during training.
    fixed = [p for p in inner.parameters() if p.is_floating_point() and not (is_peft(model) and p.requires_grad)]
    described = {
        "class": class_name(inner),
        "dtype": str(fixed[0].dtype) if fixed else None,
        "number of weights": sum(p.numel() for p in fixed),
    }
    kinds: Any = model.peft_config if is_peft(model) else {}  # type: ignore[union-attr]
    adapters = {
        name: {key: value for key, value in kind.to_dict().items() if key not in _NOT_OF_ADAPTER}
        for name, kind in kinds.items()
    }
    return _plain({"model": described, "adapters": adapters})


def _plain(described: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(described, default=_as_json))
    return made


def _as_json(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def check_model(model: nn.Module, folder: Path) -> None:
    """Refuse to load a checkpoint into a model of another kind, before anything is loaded.

    Raises:
        ValueError: the class, the dtype, the size or an option of an adapter differs; the message names the first one.
    """
    then = checkpoint.read_state(folder).get("run")
    if then is None or (not is_peft(model) and then["adapters"]):
        return
    now = _describe_model(model)
    _refuse_difference(folder, then["model"], now["model"], "a model with ")
    for name in then["adapters"].keys() & now["adapters"].keys():
        _refuse_difference(folder, then["adapters"][name], now["adapters"][name], "a PEFT adapter with ")


def check_run(zo: ZerothOrder, now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume a run with another method, another optimizer, other moving parameters or another base.

    Args:
        zo: the engine, before the checkpoint is loaded into it.
        now: this run, from `describe`.
        folder: the checkpoint.

    Raises:
        ValueError: something differs; the message names the first such argument.
    """
    state = checkpoint.read_state(folder)
    then = state.get("run")
    if then is None:
        checkpoint.check_settings(zo, state, folder)
        return
    moves_others = then["names"] != now["names"]
    if moves_others:
        _refuse_difference(folder, then["patterns"], now["patterns"])
    checkpoint.check_settings(zo, state, folder)
    if moves_others:
        raise ValueError(
            f"{folder} was written by a run in which other parameters moved; freeze the same parameters, and use the same "
            "optimizer."
        )
    _refuse_difference(folder, {"optim": then["optimizer"]["optim"]}, {"optim": now["optimizer"]["optim"]})
    for before, after in zip(then["optimizer"]["groups"], now["optimizer"]["groups"], strict=True):
        _refuse_difference(folder, before, after)
    rows = state["engine"].get("row_groups")
    if rows is not None and rows[0]:
        # A step then has a number for each of its rows, in the log as well.
        per_step = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
        before, after = ({name: run["arguments"][name] for name in per_step} for run in (then, now))
        if math.prod(before.values()) != math.prod(after.values()):
            _refuse_difference(folder, before, after)
    if state.get("base") is not None:
        _check_base(zo, state["base"], folder)


def _check_base(zo: ZerothOrder, base: str, folder: Path) -> None:
    """Refuse an adapter of another base model; `base` is the hash of the weights that the run began with."""
    subspace = zo.subspace
    holds_base = isinstance(subspace, Adapter) or (isinstance(subspace, LowRank) and subspace.becomes_adapter)
    if not holds_base or is_divided_model(zo.model):
        return
    leave_out = list(subspace.start.values()) if isinstance(subspace, Adapter) else []
    if weights_hash(zo.model, leave_out) != base:
        raise ValueError(
            f"{folder} holds an adapter of another base model: the weights of this one differ; load the model that the run "
            "began with."
        )


def _refuse_difference(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any], of: str = "") -> None:
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            raise ValueError(
                f"{folder} was written with {of}{name}={then.get(name)!r} and this run has {name}={now.get(name)!r}; "
                "resume with the same value."
            )


def changed_arguments(now: Mapping[str, Any], folder: Path) -> dict[str, tuple[Any, Any]]:
    """Return the arguments that differ from those of a checkpoint's run, with their values then and now."""
    run = checkpoint.read_state(folder).get("run")
    if run is None:
        return {}
    then, after = run["arguments"], now["arguments"]
    changed = {name: (then[name], after[name]) for name in after if name in then and then[name] != after[name]}
    if then["max_steps"] > 0 and after["max_steps"] > 0:
        changed.pop("num_train_epochs", None)
    return changed


def report(changed: Mapping[str, tuple[Any, Any]], folder: Path) -> None:
    """Say in one line which arguments are taken over; nothing if there are none."""
    said = {name: values for name, values in changed.items() if name != "number of steps" or len(changed) == 1}
    if said:
        each = ", ".join(f"{name}={now!r} (was {then!r})" for name, (then, now) in said.items())
        logger.warning("the run of %s goes on with other arguments: %s", folder, each)


class NoState:
    """Stands in for a schedule of another kind than the checkpoint's, whose state would not fit."""

    def load_state_dict(self, state: Any) -> None:
        """Ignore the state."""


def take_over_rate(
    changed: Mapping[str, tuple[Any, Any]], optimizer: Optimizer, scheduler: Any, rates: Sequence[float], step: int
) -> None:
    """Let an optimizer that has a checkpoint's state go on with this run's learning rate and schedule.

    Args:
        changed: the arguments that differ, from `changed_arguments`.
        optimizer: the optimizer.
        scheduler: the schedule of its learning rate.
        rates: learning rate of every parameter group at the beginning of this run.
        step: number of steps taken.
    """
    if not any(name in changed for name in _OF_SCHEDULE):
        return
    groups = optimizer.param_groups
    if "learning_rate" not in changed:
        rates = rates_of(optimizer)
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs, scheduler.last_epoch = list(rates), step
        next_rates = [rate * factor(step) for rate, factor in zip(rates, scheduler.lr_lambdas, strict=True)]
        scheduler._last_lr = list(next_rates)
    else:  # it reacts to the run, and has moved the rate by a factor
        before = changed["learning_rate"][0] if "learning_rate" in changed else rates_of(optimizer)
        firsts = before if isinstance(before, list) else [before] * len(groups)
        factors = [float(group["lr"]) / first for group, first in zip(groups, firsts, strict=True)]
        next_rates = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
    for group, first, now in zip(groups, rates, next_rates, strict=True):
        group["initial_lr"], group["lr"] = first, now
