"""Checks of a log against the model, and against the engine that replays it, before any weight is written."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zo_hf.directions.orthogonal import Orthogonal
from zo_hf.engine import ZerothOrder
from zo_hf.parallel.checksum import tensors_hash
from zo_hf.quantization import quantized_layers
from zo_hf.rules import SVRG
from zo_hf.settings import Settings
from zo_hf.subspaces import Adapter, Full, has_factors, subspace_kind
from zo_hf.trajectory.header import OPTIMIZERS
from zo_hf.trajectory.log import Trajectory, TrajectoryError
from zo_hf.untrusted.fields import Fits, brief, is_flag, list_of, maybe, number, shown
from zo_hf.untrusted.tensors import read_tensors

START_FILE = "start.safetensors"

# Numbers that a replay may hold beside the model, however small the model is.
_SPARE_NUMBERS = 1 << 22
# Far above all options of an optimizer; products with the largest learning rate stay below the overflow of float32.
_LARGEST_OPTION = 1e10
_START_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_replayable(trajectory: Trajectory) -> None:
    """Refuse a log that does not begin at a base model, or whose optimizer cannot be rebuilt.

    Raises:
        TrajectoryError: the log cannot be replayed; the message gives the reason.
    """
    header = trajectory.header
    if header["first_step"] != 0 or header["base"].get("weights") is None:
        raise TrajectoryError(
            f"{trajectory.path} begins at step {header['first_step']} and not at a base model; use the checkpoint that "
            "the run was resumed from."
        )
    if not header["optimizer"]["replayable"] or header["optimizer"]["kind"] not in OPTIMIZERS:
        raise TrajectoryError(
            f"the optimizer of {trajectory.path} is {shown(header['optimizer']['kind'])}, which replay cannot rebuild; it "
            f"knows {', '.join(OPTIMIZERS)} with plain numbers as options."
        )
    for record in trajectory.records:
        if record.unfaithful:
            raise TrajectoryError(
                f"the optimizer's options had changed by step {record.step} of {trajectory.path}; replay until step "
                f"{record.step}."
            )


def moved_names(trajectory: Trajectory) -> list[str]:
    """Return the names of the coordinates that a run moved."""
    return [name for group in trajectory.header["groups"] for name in group["names"]]


def moved_parameters(model: nn.Module, trajectory: Trajectory) -> dict[str, nn.Parameter]:
    """Return the parameters that moved, by name, except weights of quantized layers that have no parameter (GPTQ).

    Raises:
        TrajectoryError: the model lacks a parameter.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    layers, modules = quantized_layers(model), dict(model.named_modules())
    names = [
        name
        for name in moved_names(trajectory)
        if modules.get(name.removesuffix(".weight")) not in layers or name in known
    ]
    for name in names:
        if name not in known:
            raise TrajectoryError(
                f"{trajectory.path} moves {shown(name)}, which this {type(model).__name__} does not have; build the model "
                "as for the run, its adapter included."
            )
    return {name: known[name] for name in names}


def moves_adapter(trajectory: Trajectory) -> bool:
    """Return whether a run moved the weights of an adapter, whose start is saved beside the log."""
    return bool(trajectory.header["settings"]["zo_subspace"] == Adapter.name)


def read_start(trajectory: Trajectory) -> dict[str, Tensor]:
    """Read the weights that an adapter began with, by name, float32 or float64.

    Raises:
        TrajectoryError: their file cannot be read, or does not belong to the log.
    """
    path = trajectory.path.with_name(START_FILE)
    try:
        start = read_tensors(path)
    except ValueError as error:
        raise TrajectoryError(f"{path} cannot be read; copy it from where the log came from.") from error
    if tensors_hash(start) != trajectory.header.get("start"):
        raise TrajectoryError(f"{path} does not belong to {trajectory.path.name}; copy both from the same run.")
    return start


def check_start(model: nn.Module, trajectory: Trajectory, start: Mapping[str, Tensor]) -> None:
    """Refuse starting weights that are not those of this model's adapter.

    Raises:
        TrajectoryError: one is missing, is none of the model's, has another shape or is not finite.
    """
    path, known = trajectory.path.with_name(START_FILE), dict(model.named_parameters(remove_duplicate=False))
    build = "build the model as for the run, its adapter included"
    for name in moved_names(trajectory):
        if name not in start:
            raise TrajectoryError(
                f"{path} lacks {shown(name)}, which the run moved; copy it from where the log came from."
            )
    for name, tensor in start.items():
        if name not in known:
            raise TrajectoryError(f"{path} holds {shown(name)}, which this model does not have; {build}.")
        if tensor.shape != known[name].shape:
            raise TrajectoryError(
                f"{path} holds {shown(name)} with the shape {list(tensor.shape)} and this model has "
                f"{list(known[name].shape)}; {build}."
            )
        if tensor.dtype not in _START_DTYPES or not bool(tensor.isfinite().all()):
            raise TrajectoryError(
                f"{path} holds {shown(name)} with numbers that no run starts from; copy it from where the log came from."
            )


def settings_of(model: nn.Module, trajectory: Trajectory) -> Settings:
    """Return the settings of a run.

    Raises:
        TrajectoryError: a setting is unknown or impossible, or asks for far more memory than the model.
    """
    moved = "|".join(re.escape(name) for name in moved_names(trajectory))
    path, saved = trajectory.path, trajectory.header["settings"]
    try:
        settings = Settings.from_saved(saved, target_modules=moved)
        kind = subspace_kind(settings.subspace_of(model), settings.moves_along_coordinates)
    except ValueError as error:
        raise TrajectoryError(f"{path} was written with a method that this version lacks: {error}") from error
    tensors = [*model.parameters(), *model.buffers()]
    held = 0
    if has_factors(kind):
        rank = settings.rank or kind.default_rank
        matrices = [
            t for t in tensors if t.ndim >= 2 and t.numel() and rank < max(t.shape[-1], t.numel() // t.shape[0])
        ]
        held += sum(rank * (t.numel() // max(1, t.shape[-1]) + t.shape[-1]) for t in matrices)
    if settings.rule == SVRG.name:
        held += settings.svrg_batches * settings.num_directions
    if settings.direction == Orthogonal.name:
        held += settings.num_directions**2
    if held > 4 * sum(t.numel() for t in tensors) + _SPARE_NUMBERS:
        raise TrajectoryError(
            f"{path} asks for {held} numbers beside a model of {sum(t.numel() for t in tensors)}, so zo_hf did not write it; "
            "use another copy of it."
        )
    return settings


def optimizer_groups(zo: ZerothOrder, trajectory: Trajectory) -> list[dict[str, Any]]:
    """Return the parameter groups of the run's optimizer, whose options have been tried on one number.

    Raises:
        TrajectoryError: the groups or their options are not those of a run with these coordinates.
    """
    path, kind = trajectory.path, trajectory.header["optimizer"]["kind"]
    coordinates, is_full = zo.subspace.coordinates, isinstance(zo.subspace, Full)
    if set(moved_names(trajectory)) != set(coordinates):
        odd = sorted(set(moved_names(trajectory)) ^ set(coordinates))[0]
        raise TrajectoryError(
            f"{path} moves other parameters than its settings select, among them {shown(odd)}; use another copy of it."
        )
    if (kind == "SeededSGD") != is_full:
        raise TrajectoryError(
            f"{path} was not written by zo_hf, because {kind} does not move {zo.subspace.name} coordinates; use another "
            "copy of it."
        )
    groups = []
    for group in trajectory.header["groups"]:
        options = {} if is_full else _tried(OPTIMIZERS[kind], group["options"], next(iter(coordinates.values())), path)
        if is_full:
            decay = group["options"].get("weight_decay", 0.0)
            if not number(0.0, _LARGEST_OPTION)(decay):
                raise _impossible(path, "weight_decay", decay)
            options = {"weight_decay": decay}
        groups.append({"params": [coordinates[name] for name in group["names"]]} | options)
    return groups


def check_numbers(zo: ZerothOrder, trajectory: Trajectory) -> None:
    """Refuse a log whose settings are not the engine's, or whose records do not have the numbers of its method.

    Raises:
        TrajectoryError: a setting or a count differs, or a rule has no such choice; the message names it.
    """
    path, header = trajectory.path, trajectory.header
    saved, resolved = header["settings"], zo.saved_settings()
    for name, value in resolved.items():
        if name in saved and not _is_same(saved[name], value):
            raise TrajectoryError(
                f"{path} has {name}={brief(saved[name])}, which is {brief(value)} with this model and method; build the "
                "model as for the run."
            )
    by_groups, each = bool(zo.settings.rows_per_direction), zo.estimator.numbers
    of_estimator = header["directions"] - bool(zo.rule.candidates)
    if of_estimator % each if by_groups else header["directions"] != zo.numbers:
        raise TrajectoryError(
            f"{path} has {header['directions']} numbers a step and its method has {each if by_groups else zo.numbers}, so "
            "zo_hf did not write it; use another copy of it."
        )
    if zo.rule.candidates:
        for record in trajectory.records:
            if not record.skipped and record.projected_gradients[-1] not in zo.rule.candidates:
                raise TrajectoryError(
                    f"the record of step {record.step} in {path} holds no choice of zo_rule={zo.rule.name!r}; use another "
                    "copy of the file."
                )


@contextmanager
def unchanged_if_refused(model: nn.Module) -> Iterator[None]:
    """Give a model back its trainable weights, in their dtypes, if an error leaves this context.

    An adapter's subspace replaces tensors by others of another dtype when it is made. Nothing may be written in place.
    """
    held = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    except BaseException:
        for parameter, data in held:
            parameter.data = data
        raise


def _tried(kind: type[Optimizer], options: Mapping[str, Any], coordinate: Tensor, path: object) -> dict[str, Any]:
    """Return a group's options that the optimizer knows, after two steps with them on one number.

    Torch checks some options when an optimizer is made, some in a step, and those of a group never.
    """
    stand_in = nn.Parameter(torch.zeros(1, dtype=coordinate.dtype, device=coordinate.device))
    defaults = {name: value for name, value in kind([stand_in]).defaults.items() if name != "lr"}  # type: ignore[call-arg]
    known = {name: value for name, value in options.items() if name in defaults}
    for name, value in known.items():
        if not _option_like(defaults[name])(value):
            raise _impossible(path, name, value)
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    stand_in.grad = torch.ones_like(stand_in)
    make: Any = kind
    arguments = {name: value for name, value in known.items() if name in inspect.signature(make).parameters}
    try:
        make([stand_in], **arguments)
        optimizer = make([{"params": [stand_in]} | known])
        optimizer.step()
        optimizer.step()
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise TrajectoryError(
            f"{path} has options of {kind.__name__} that it refuses ({shown(reason)}); use another copy of it."
        ) from error
    return known


def _option_like(default: Any) -> Fits:
    """Return a test for values of the kind of an optimizer's default."""
    if isinstance(default, bool):
        return is_flag
    if default is None:
        return maybe(is_flag)
    a_number = number(-_LARGEST_OPTION, _LARGEST_OPTION)
    return list_of(a_number, len(default), len(default)) if isinstance(default, tuple) else a_number


def _is_same(saved: Any, value: Any) -> bool:
    return bool(saved == value) and isinstance(saved, bool) == isinstance(value, bool)


def _impossible(path: object, name: str, value: Any) -> TrajectoryError:
    return TrajectoryError(f"{path} has {name}={brief(value)}, which no optimizer has; use another copy of it.")
