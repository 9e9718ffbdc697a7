"""From a base model and a trajectory back to the fine-tuned model, without data and without a forward pass."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from zo_hf.estimators import ESTIMATORS
from zo_hf.optimizers import RuleOptions
from zo_hf.quantization import quantized_layers
from zo_hf.subspaces import SUBSPACES, Adapter, Full, Subspace, has_factors, subspace_kind
from zo_hf.trajectory.header import OPTIMIZERS, check_base, tensors_hash
from zo_hf.trajectory.log import Record, Trajectory, TrajectoryError, read_trajectory
from zo_hf.zeroth_order import ZerothOrder

logger = logging.getLogger(__name__)

START_FILE = "start.safetensors"


def verify(path: str | Path, model: nn.Module | None = None, until: int | None = None) -> Trajectory:
    """Read a trajectory and check all that can be checked of it.

    Args:
        path: the log, or a run's output folder, or a checkpoint.
        model: also check that the log begins at this model.
        until: look no further than this step.

    Raises:
        TrajectoryError: something is damaged or does not belong together; the message names it.
    """
    trajectory = read_trajectory(path, until)
    if trajectory.header.get("start"):
        read_start(trajectory)
    if model is not None:
        check_replayable(trajectory)
        check_base(trajectory.header["base"], model, _left_out(model, trajectory), trajectory.path)
    return trajectory


def replay(model: nn.Module, path: str | Path, until: int | None = None, progress: bool = False) -> Any:
    """Take a run's optimizer steps again: the base model becomes the trained one, bit for bit.

    The bits are the same on the same kind of device and with the same versions of torch; elsewhere the last place of a
    sum may differ.

    Args:
        model: the base model, in the dtype of the run; for an adapter, wrapped as the run's model was. It is changed.
        path: the log, or a run's output folder, or a checkpoint.
        until: stop after this many steps; None takes all.
        progress: show a bar.

    Returns:
        `model`, or the PEFT model around it that a run over a quantised model without folds ends with.

    Raises:
        TrajectoryError: the log is damaged, cannot be replayed, or begins at another model. Nothing was changed then.
    """
    trajectory = verify(path, model, until)
    if until is not None and not 0 <= until <= trajectory.steps:
        raise TrajectoryError(f"{trajectory.path} holds {trajectory.steps} steps; choose until={until} among them.")
    parameters = _parameters(model, trajectory)
    device, then = next(model.parameters()).device.type, trajectory.header["base"].get("device")
    if device != then:
        logger.warning("the run was on %s and this replay is on %s: the last place of a sum may differ", then, device)
    frozen = [p for p in parameters.values() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:  # what moved in the run moves now
        parameter.requires_grad_(True)
    try:
        zo, optimizer = _rebuild(model, trajectory)
        try:
            take_steps(zo, optimizer, trajectory, progress)
        finally:
            learnt = zo.finish()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return learnt


def take_steps(zo: ZerothOrder, optimizer: Optimizer, trajectory: Trajectory, progress: bool = False) -> None:
    """Every step of a trajectory, with an engine and an optimizer that are at its beginning."""
    if isinstance(zo.subspace, Adapter):
        start = read_start(trajectory)
        with torch.no_grad():
            known = dict(zo.model.named_parameters(remove_duplicate=False))
            for name, tensor in start.items():
                known[name].copy_(tensor)
    records: Iterable[Record] = trajectory.records
    for record in tqdm(records, desc="replay", unit="step", disable=not progress):
        for group, rate in zip(optimizer.param_groups, record.learning_rates, strict=True):
            group["lr"] = rate
        zo.apply(record.projected_gradients, record.skipped)
        zo.subspace.scale_gradient(record.clip_factor)
        optimizer.step()


def read_start(trajectory: Trajectory) -> dict[str, Tensor]:
    """The weights that an adapter began with.

    Raises:
        TrajectoryError: their file is missing or not the one that belongs to the log.
    """
    path = trajectory.path.with_name(START_FILE)
    try:
        start = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrajectoryError(f"{path} cannot be read; copy it from where the log came from.") from error
    if tensors_hash(start) != trajectory.header["start"]:
        raise TrajectoryError(f"{path} does not belong to {trajectory.path.name}; copy both from the same run.")
    return start


def check_replayable(trajectory: Trajectory) -> None:
    """Refuse a log that does not begin at a base model, or whose optimizer cannot be rebuilt.

    Raises:
        TrajectoryError: it is one; the message says which.
    """
    header = trajectory.header
    if header["first_step"] != 0 or header["base"].get("weights") is None:
        raise TrajectoryError(
            f"{trajectory.path} begins at step {header['first_step']} and not at a base model; use the checkpoint that "
            "the run was resumed from."
        )
    if not header["optimizer"].get("replayable") or header["optimizer"].get("kind") not in OPTIMIZERS:
        raise TrajectoryError(
            f"the optimizer of {trajectory.path} is {header['optimizer'].get('kind')}, which replay cannot rebuild; it "
            f"knows {', '.join(OPTIMIZERS)} with plain numbers as options."
        )
    for record in trajectory.records:
        if record.unfaithful:
            raise TrajectoryError(
                f"the optimizer's options had changed by step {record.step} of {trajectory.path}; replay until step "
                f"{record.step}."
            )


def _parameters(model: nn.Module, trajectory: Trajectory) -> dict[str, nn.Parameter]:
    """The parameters that moved, by name; without the weights of layers that have none, e.g. GPTQ's."""
    known = dict(model.named_parameters(remove_duplicate=False))
    layers, modules = quantized_layers(model), dict(model.named_modules())
    names = [
        name for name in _names(trajectory) if modules.get(name.removesuffix(".weight")) not in layers or name in known
    ]
    for name in names:
        if name not in known:
            raise TrajectoryError(
                f"{trajectory.path} moves {name}, which this {type(model).__name__} does not have; build the model as "
                "for the run, its adapter included."
            )
    return {name: known[name] for name in names}


def _names(trajectory: Trajectory) -> list[str]:
    return [name for group in trajectory.header["groups"] for name in group["names"]]


def _left_out(model: nn.Module, trajectory: Trajectory) -> list[nn.Parameter]:
    """What the hash of the base does not cover: an adapter's own weights, which are saved beside the log."""
    moved = _parameters(model, trajectory)
    if trajectory.header["settings"]["zo_subspace"] != Adapter.name:
        return []
    known = dict(model.named_parameters(remove_duplicate=False))
    return [known[name] for name in {*moved, *read_start(trajectory)} if name in known]


def _rebuild(model: nn.Module, trajectory: Trajectory) -> tuple[ZerothOrder, Optimizer]:
    """The engine and the optimizer that the run had before its first step."""
    settings: dict[str, Any] = trajectory.header["settings"]
    estimator, rule = settings.get("zo_estimator", "two_point"), settings.get("zo_rule", "none")
    if settings["zo_subspace"] not in SUBSPACES or estimator not in ESTIMATORS:
        unknown = "subspace" if settings["zo_subspace"] not in SUBSPACES else "estimator"
        raise TrajectoryError(f"{trajectory.path} has an unknown {unknown} {settings[f'zo_{unknown}']!r}.")
    kind = subspace_kind(settings["zo_subspace"], ESTIMATORS[estimator].along_coordinates)
    subspace: Subspace
    moved = "|".join(re.escape(name) for name in _names(trajectory))
    if has_factors(kind):
        rank, fold_steps = settings["zo_rank"], settings["zo_fold_steps"]
        subspace = kind(model, rank, fold_steps, target_modules=moved, seed=settings["seed"])
    else:
        subspace = kind(model, target_modules=moved, seed=settings["seed"])
    zo = ZerothOrder(
        model,
        subspace,
        eps=settings["zo_eps"],
        num_directions=settings["zo_num_directions"],
        estimator=estimator,
        direction=settings["zo_direction"],
        active_layers=settings.get("zo_active_layers"),
        coordinate_order=settings.get("zo_coordinate_order") or "cyclic",
        rule=rule,
        rule_options=RuleOptions(
            **{
                field.name: settings[f"zo_{field.name}"]
                for field in fields(RuleOptions)
                if f"zo_{field.name}" in settings
            }
        ),
        max_projected_grad=settings["zo_max_projected_grad"],
        normalize=settings["zo_normalize"],
        seed=settings["seed"],
        replays=True,
    )
    groups = [
        {"params": [subspace.coordinates[name] for name in group["names"]]}
        | {name: tuple(value) if isinstance(value, list) else value for name, value in group["options"].items()}
        for group in trajectory.header["groups"]
    ]
    optimizer_kind: Any = OPTIMIZERS[trajectory.header["optimizer"]["kind"]]
    more = {"subspace": subspace} if isinstance(subspace, Full) else {}
    return zo, zo.prepare(optimizer_kind(groups, **more))
