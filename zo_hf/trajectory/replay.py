"""Replay: a base model and a trajectory become the fine-tuned model, without data and without a forward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from zo_hf import checkpoint
from zo_hf.engine import ZerothOrder
from zo_hf.offload import computing_devices, whole_state_dict
from zo_hf.subspaces import Adapter, Full
from zo_hf.subspaces.peft_methods import is_peft
from zo_hf.trajectory.checks import (
    check_numbers,
    check_replayable,
    check_start,
    moved_parameters,
    moves_adapter,
    optimizer_groups,
    read_start,
    settings_of,
    unchanged_if_refused,
)
from zo_hf.trajectory.header import OPTIMIZERS, check_base
from zo_hf.trajectory.log import Record, Trajectory, TrajectoryError, read_trajectory

logger = logging.getLogger(__name__)


def verify(path: str | Path, model: nn.Module | None = None, until: int | None = None) -> Trajectory:
    """Read a trajectory and check everything in it that can be checked.

    Args:
        path: the log, or a run's output folder, or a checkpoint.
        model: also check that the log begins at this model; None does not.
        until: check only the records before this step; None checks all.

    Raises:
        TrajectoryError: a file is damaged, files do not belong together, or the log does not reach `until`.
    """
    trajectory = read_trajectory(path, until)
    if until is not None and not trajectory.first_step <= until <= trajectory.steps:
        whole = read_trajectory(path)
        raise TrajectoryError(
            f"{whole.path} holds {len(whole.records)} steps, and until={until} is not among them; choose a step from "
            f"{whole.first_step} to {whole.steps}."
        )
    if trajectory.header.get("start"):
        read_start(trajectory)
    if model is not None:
        check_replayable(trajectory)
        check_base(trajectory.header["base"], model, _left_out(model, trajectory), trajectory.path)
    return trajectory


def replay(model: nn.Module, path: str | Path, until: int | None = None, progress: bool = False) -> Any:
    """Take a run's optimizer steps again, so that the base model becomes the trained model, bit for bit.

    The same kind of device and the same version of torch give the same bits. Otherwise the last place of a sum may differ.

    Args:
        model: the base model, in the dtype of the run; for an adapter, wrapped as the run's model was. It is changed.
        path: the log, or a run's output folder, or a checkpoint.
        until: stop after this many steps; None takes all.
        progress: show a progress bar.

    Returns:
        `model`; after a run over a quantized model without folds, the PEFT model around it.

    Raises:
        TrajectoryError: the log is damaged, cannot be replayed, or begins at another model. The model is then unchanged.
    """
    trajectory = verify(path, model, until)
    parameters = moved_parameters(model, trajectory)
    if moves_adapter(trajectory):
        check_start(model, trajectory, read_start(trajectory))
    device, then = computing_devices(model)[0].type, trajectory.header["base"].get("device")
    if device != then:
        logger.warning("the run was on %s and this replay is on %s: the last place of a sum may differ", then, device)
    frozen = [p for p in parameters.values() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:  # it moved in the run, and a subspace selects trainable parameters only
        parameter.requires_grad_(True)
    try:
        with unchanged_if_refused(model):
            zo, optimizer = _rebuild(model, trajectory)
        try:
            take_steps(zo, optimizer, trajectory, progress)
        finally:
            trained = zo.finish()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    _compare(trained, trajectory)
    return trained


def _compare(trained: nn.Module, trajectory: Trajectory) -> None:
    """Warn if a replay to the step of the run's checkpoint gives other weights than were written there."""
    folder = trajectory.path.parent.parent / f"{PREFIX_CHECKPOINT_DIR}-{trajectory.steps}"
    try:
        state = checkpoint.read_state(folder)
    except ValueError:  # nothing to compare with
        return
    written = state.get("weights")
    # An adapter's weights have another dtype in a checkpoint than after training.
    if written is None or state.get("trajectory") != trajectory.crcs[-1] or is_peft(trained):
        return
    if checkpoint.weights_hash_of(trained, whole_state_dict(trained)) != written:
        logger.warning(
            "the replay gives other weights than the run wrote into %s; on the same kind of device, with the same version "
            "of torch and without FSDP they are equal to the bit",
            folder,
        )


def take_steps(zo: ZerothOrder, optimizer: Optimizer, trajectory: Trajectory, progress: bool = False) -> None:
    """Take every step of a trajectory, with an engine and an optimizer that are at its beginning."""
    if isinstance(zo.subspace, Adapter):
        start = read_start(trajectory)
        with torch.no_grad():
            known = dict(zo.model.named_parameters(remove_duplicate=False))
            for name, tensor in start.items():
                known[name].copy_(tensor)
    still = trajectory.header.get("still") or []
    zo.subspace.still = set(still)
    records: Iterable[Record] = trajectory.records
    for record in tqdm(records, desc="replay", unit="step", disable=not progress):
        for group, rate in zip(optimizer.param_groups, record.learning_rates, strict=True):
            group["lr"] = rate
        zo.subspace.still -= {still[index] for index in record.begins}
        zo.apply(record.projected_gradients, record.skipped)
        zo.subspace.scale_gradient(record.clip_factor)
        optimizer.step()


def _left_out(model: nn.Module, trajectory: Trajectory) -> list[nn.Parameter]:
    """Return an adapter's own weights, which are saved beside the log and not covered by the hash of the base."""
    moved = moved_parameters(model, trajectory)
    if not moves_adapter(trajectory):
        return []
    known = dict(model.named_parameters(remove_duplicate=False))
    return [known[name] for name in {*moved, *read_start(trajectory)} if name in known]


def _rebuild(model: nn.Module, trajectory: Trajectory) -> tuple[ZerothOrder, Optimizer]:
    """Rebuild the engine and the optimizer that the run had before its first step.

    Raises:
        TrajectoryError: the log's settings and options do not make them; the engine has then left the model.
    """
    settings = settings_of(model, trajectory)
    try:
        zo = ZerothOrder(model, settings, replays=True)
    except (ValueError, NotImplementedError) as error:
        raise TrajectoryError(f"{trajectory.path} was written with a method that this model lacks: {error}") from error
    try:
        kind: Any = OPTIMIZERS[trajectory.header["optimizer"]["kind"]]
        more = {"subspace": zo.subspace} if isinstance(zo.subspace, Full) else {}
        optimizer = kind(optimizer_groups(zo, trajectory), **more)
        try:
            zo.prepare(optimizer)
        except ValueError as error:
            raise TrajectoryError(f"{trajectory.path} has an optimizer that its rule refuses: {error}") from error
        check_numbers(zo, trajectory)
    except BaseException:
        zo.subspace.detach()
        raise
    return zo, optimizer
