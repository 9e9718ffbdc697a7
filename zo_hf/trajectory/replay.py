"""Replay: a base model and a trajectory become the fine-tuned model, without data and without a forward pass."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from zo_hf import checkpoint
from zo_hf.engine import ZerothOrder
from zo_hf.parallel.checksum import tensors_hash
from zo_hf.quantization import quantized_layers
from zo_hf.settings import Settings
from zo_hf.subspaces import Adapter, Full
from zo_hf.subspaces.peft_methods import is_peft
from zo_hf.trajectory.header import OPTIMIZERS, check_base
from zo_hf.trajectory.log import Record, Trajectory, TrajectoryError, read_trajectory

logger = logging.getLogger(__name__)

START_FILE = "start.safetensors"


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
    parameters = _parameters(model, trajectory)
    device, then = next(model.parameters()).device.type, trajectory.header["base"].get("device")
    if device != then:
        logger.warning("the run was on %s and this replay is on %s: the last place of a sum may differ", then, device)
    frozen = [p for p in parameters.values() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:  # it moved in the run, and a subspace selects trainable parameters only
        parameter.requires_grad_(True)
    try:
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
    state = checkpoint.read_state(folder)
    written = state.get("weights")
    # An adapter's weights have another dtype in a checkpoint than after training.
    if written is None or state.get("trajectory") != trajectory.crcs[-1] or is_peft(trained):
        return
    if checkpoint.weights_hash_of(trained, trained.state_dict()) != written:
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
    still = trajectory.header.get("still", [])
    zo.subspace.still = set(still)
    records: Iterable[Record] = trajectory.records
    for record in tqdm(records, desc="replay", unit="step", disable=not progress):
        for group, rate in zip(optimizer.param_groups, record.learning_rates, strict=True):
            group["lr"] = rate
        zo.subspace.still -= {still[index] for index in record.begins}
        zo.apply(record.projected_gradients, record.skipped)
        zo.subspace.scale_gradient(record.clip_factor)
        optimizer.step()


def read_start(trajectory: Trajectory) -> dict[str, Tensor]:
    """Read the weights that an adapter began with, by name.

    Raises:
        TrajectoryError: their file cannot be read, or does not belong to the log.
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
        TrajectoryError: the log cannot be replayed; the message gives the reason.
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
    """Return the parameters that moved, by name, except weights of quantized layers that have no parameter (GPTQ)."""
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
    """Return an adapter's own weights, which are saved beside the log and not covered by the hash of the base."""
    moved = _parameters(model, trajectory)
    if trajectory.header["settings"]["zo_subspace"] != Adapter.name:
        return []
    known = dict(model.named_parameters(remove_duplicate=False))
    return [known[name] for name in {*moved, *read_start(trajectory)} if name in known]


def _rebuild(model: nn.Module, trajectory: Trajectory) -> tuple[ZerothOrder, Optimizer]:
    """Rebuild the engine and the optimizer that the run had before its first step."""
    moved = "|".join(re.escape(name) for name in _names(trajectory))
    try:
        settings = Settings.from_saved(trajectory.header["settings"], target_modules=moved)
    except ValueError as error:
        raise TrajectoryError(
            f"{trajectory.path} was written with a method that this version lacks: {error}"
        ) from error
    zo = ZerothOrder(model, settings, replays=True)
    subspace = zo.subspace
    groups = [
        {"params": [subspace.coordinates[name] for name in group["names"]]}
        | {name: tuple(value) if isinstance(value, list) else value for name, value in group["options"].items()}
        for group in trajectory.header["groups"]
    ]
    optimizer_kind: Any = OPTIMIZERS[trajectory.header["optimizer"]["kind"]]
    more = {"subspace": subspace} if isinstance(subspace, Full) else {}
    return zo, zo.prepare(optimizer_kind(groups, **more))
