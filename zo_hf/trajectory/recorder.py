"""Recording of a Trainer's run beside its checkpoints, and continuing a recording.

    OUTPUT_DIR/trajectory/steps.zolog            the log, see `log.py`
    OUTPUT_DIR/trajectory/start.safetensors      an adapter's starting weights, which PEFT draws at random
    OUTPUT_DIR/trajectory/adapter_config.json    the PEFT configuration of that adapter
    OUTPUT_DIR/_trajectory.previous/             the log of the run that used this folder before

A checkpoint's zo_state.json holds the log's CRC-32 at its step, which tells a log of this run from a log of another run.
With `save_only_trajectory` a checkpoint holds a copy of the trajectory folder instead of tensors.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch.optim import Optimizer

from zo_hf import checkpoint
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.estimate import Step
from zo_hf.parallel.shards import is_divided_model
from zo_hf.subspaces import Adapter, adapter_config
from zo_hf.subspaces.peft_methods import active_adapter
from zo_hf.trajectory.checks import START_FILE, check_numbers, check_replayable, check_start, read_start
from zo_hf.trajectory.header import build_header, check_base, describe_groups, options_of
from zo_hf.trajectory.log import FILE, FOLDER, Record, Trajectory, TrajectoryError, Writer, read_trajectory
from zo_hf.trajectory.replay import take_steps
from zo_hf.untrusted.fields import brief, shown

logger = logging.getLogger(__name__)

#: Files that a log needs beside it.
_BESIDE = (START_FILE, adapter_config.FILE)


class Recorder:
    """Writes one record after every optimizer step of an engine.

    If the log cannot be written, the recorder warns and stops, and the training goes on, unless the log is required.

    Args:
        header: the header of the log.
        writer: the writer of the log; None records nothing.
        optimizer: the optimizer; a change of its options since the header was written is recorded.
        required: True if an error of the disk must end the training, because the checkpoints consist of the log.

    Attributes:
        base: hash of the weights that the log begins at; None if it begins later.
    """

    def __init__(
        self, header: dict[str, Any], writer: Writer | None, optimizer: Optimizer, required: bool = False
    ) -> None:
        self.base: str | None = header["base"].get("weights")
        self._options = [group["options"] for group in header["groups"]]
        self._index = {name: index for index, name in enumerate(header.get("still", ()))}
        self._writer, self._optimizer, self._required = writer, optimizer, required

    def __call__(self, step: Step) -> None:
        if self._writer is None:
            return
        changed = [options_of(group) for group in self._optimizer.param_groups] != self._options
        record = Record(
            step.step,
            step.skipped,
            changed,
            step.projected_gradients,
            step.learning_rates,
            step.clip_factor,
            tuple(self._index[name] for name in step.begins),
        )
        with self._stopping_on_disk_errors():
            self._writer.append(record)

    def sync(self) -> int | None:
        """Sync the log to the disk; returns its CRC-32 up to now, or None without a log."""
        if self._writer is not None:
            with self._stopping_on_disk_errors():
                self._writer.sync()
        return None if self._writer is None else self._writer.crc

    def copy_into(self, checkpoint_folder: Path) -> None:
        """Copy the trajectory folder into a checkpoint."""
        assert self._writer is not None
        target = checkpoint_folder / FOLDER
        target.mkdir(parents=True, exist_ok=True)
        for name in (FILE, *_BESIDE):
            if (self._writer.path.parent / name).is_file():
                shutil.copyfile(self._writer.path.parent / name, target / name)

    def close(self) -> None:
        """Close the log."""
        if self._writer is not None:
            with self._stopping_on_disk_errors():
                self._writer.close()

    @contextmanager
    def _stopping_on_disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._required:
                raise
            logger.warning("the trajectory of this run is not complete and ends here: %s", error)
            self._writer = None


def begin(
    zo: ZerothOrder, optimizer: Optimizer, output_dir: Path, required: bool = False, base_hash: str | None = None
) -> Recorder:
    """Start the log of a run whose model, at this moment, is the base.

    Args:
        zo: the run's engine.
        optimizer: the run's optimizer.
        output_dir: the run's folder.
        required: refuse a run that cannot be replayed, because its checkpoints will depend on the log.
        base_hash: `weights_hash` of the base, if this process holds only a part of it; None computes it.

    Raises:
        ValueError: the log is required, and a replay cannot rebuild the optimizer.
    """
    whole = not is_divided_model(zo.model)
    header = build_header(zo, optimizer, from_base=whole or base_hash is not None, base_hash=base_hash)
    if required and not header["optimizer"]["replayable"]:
        raise ValueError(
            f"save_only_trajectory=True cannot replay {header['optimizer']['kind']}; use optim='sgd' or 'adamw_torch', "
            "or leave it out."
        )
    try:
        folder = _new_folder(output_dir)
        if isinstance(zo.subspace, Adapter):
            save_file({n: p.detach().contiguous() for n, p in zo.subspace.start.items()}, folder / START_FILE)
            _save_adapter_config(zo.model, folder)
        return Recorder(header, Writer(folder / FILE, header), optimizer, required)
    except OSError as error:
        return _without_log(header, optimizer, required, error)


def resume(
    zo: ZerothOrder, optimizer: Optimizer, output_dir: Path, checkpoint_folder: Path, required: bool = False
) -> Recorder:
    """Continue the log of the run that wrote a checkpoint, from that checkpoint's step.

    Args:
        zo: the run's engine.
        optimizer: the run's optimizer.
        output_dir: the folder of this run; if the log is in another folder, it is copied here.
        checkpoint_folder: the checkpoint.
        required: see `begin`.

    Raises:
        ValueError: the log is required and does not reach the checkpoint.
    """
    try:
        trajectory = _log_up_to(zo, optimizer, checkpoint_folder, output_dir)
        if required:
            check_replayable(trajectory)
        if trajectory.header.get("start"):  # they are copied with the log
            read_start(trajectory)
    except TrajectoryError as reason:
        if required:
            raise ValueError(
                f"save_only_trajectory=True needs the log of the run so far ({str(reason).rstrip('.')}); leave it out, so that "
                "checkpoints hold weights."
            ) from reason
        logger.warning(
            "the new log begins at step %d: it does not begin at the base model, and cannot be replayed (%s)",
            zo.step,
            reason,
        )
        return _begin_late(zo, optimizer, output_dir)
    source, folder = trajectory.path.parent, output_dir / FOLDER
    try:
        if source.resolve() != folder.resolve():
            folder = _new_folder(output_dir)
            for name in _BESIDE:  # and nothing else, because a link could lead anywhere
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
        writer = Writer.resume(trajectory, zo.step, folder / FILE)
    except OSError as error:
        return _without_log(trajectory.header, optimizer, required, error)
    return Recorder(trajectory.header, writer, optimizer, required)


def _begin_late(zo: ZerothOrder, optimizer: Optimizer, output_dir: Path) -> Recorder:
    header = build_header(zo, optimizer, from_base=False)
    try:
        return Recorder(header, Writer(_new_folder(output_dir) / FILE, header), optimizer)
    except OSError as error:
        return _without_log(header, optimizer, False, error)


def _without_log(header: dict[str, Any], optimizer: Optimizer, required: bool, error: OSError) -> Recorder:
    if required:
        raise error
    logger.warning("the trajectory of this run is not written: %s", error)
    return Recorder(header, None, optimizer)


def restore(zo: ZerothOrder, optimizer: Optimizer, checkpoint_folder: Path) -> None:
    """Bring an engine and an optimizer from the base model to the step of a checkpoint that holds no tensors.

    Raises:
        ValueError: the log does not lead from this model to that step with these settings.
    """
    state = checkpoint.read_state(checkpoint_folder)
    checkpoint.check_settings(zo, state, checkpoint_folder)
    rates = state.get("learning_rates") or []
    if state.get("engine") is None or len(rates) != len(optimizer.param_groups):
        raise TrajectoryError(
            f"the state in {checkpoint_folder} belongs to another run; resume from another checkpoint."
        )
    step = state["engine"]["step"]
    trajectory = read_trajectory(checkpoint_folder, until=step)
    path = trajectory.path
    if trajectory.crc_at(step) != state.get("trajectory"):
        raise TrajectoryError(f"{path} does not belong to its checkpoint; resume from another one.")
    check_replayable(trajectory)
    _check_same_groups(zo, optimizer, trajectory)
    leave_out = []
    if isinstance(zo.subspace, Adapter):
        leave_out = list(zo.subspace.start.values())
        check_start(zo.model, trajectory, read_start(trajectory))
    check_base(trajectory.header["base"], zo.model, leave_out, path)
    check_numbers(zo, trajectory)
    take_steps(zo, optimizer, trajectory)
    replayed = zo.state_dict()
    for name in ("step", "skipped_steps", "pending_decay", "normalization"):
        if replayed[name] != state["engine"].get(name):
            raise TrajectoryError(f"{path} leads to another {name} than its checkpoint's; resume from another one.")
    zo.load_state_dict(state["engine"])
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _log_up_to(zo: ZerothOrder, optimizer: Optimizer, checkpoint_folder: Path, output_dir: Path) -> Trajectory:
    """Return the log that led to a checkpoint: from this run's folder, from beside the checkpoint, or from inside it."""
    crc = checkpoint.read_state(checkpoint_folder).get("trajectory")
    if crc is None:
        raise TrajectoryError(f"{checkpoint_folder} was written by a run without a log.")
    reason = None
    for place in (output_dir, checkpoint_folder.parent, checkpoint_folder):
        try:
            trajectory = read_trajectory(place, until=zo.step)
        except TrajectoryError as error:
            reason = reason or error
            continue
        if trajectory.crc_at(zo.step) == crc:
            _check_same_groups(zo, optimizer, trajectory)
            return trajectory
        if trajectory.crc_at(zo.step) is None:
            reason = TrajectoryError(f"{trajectory.path} does not reach step {zo.step} of {checkpoint_folder.name}.")
        else:
            reason = TrajectoryError(f"{trajectory.path} belongs to another run than {checkpoint_folder.name}.")
    assert reason is not None
    raise reason


def _check_same_groups(zo: ZerothOrder, optimizer: Optimizer, trajectory: Trajectory) -> None:
    kind = trajectory.header["optimizer"]["kind"]
    if type(optimizer).__name__ != kind:
        raise TrajectoryError(
            f"{trajectory.path} was written with {shown(kind)} and this run has {type(optimizer).__name__}; use the same."
        )
    then, now = trajectory.header["groups"], describe_groups(zo.subspace, optimizer)
    if [group["names"] for group in then] != [group["names"] for group in now]:
        raise TrajectoryError(
            f"{trajectory.path} was written with other parameter groups than this run's; use the same."
        )
    for before, after in zip(then, now, strict=True):
        for name, value in before["options"].items():
            if after["options"].get(name) != value:
                raise TrajectoryError(
                    f"{trajectory.path} was written with {shown(name)}={brief(value)} and this run has "
                    f"{shown(name)}={brief(after['options'].get(name))}; use the same."
                )


def _new_folder(output_dir: Path) -> Path:
    """Make an empty trajectory folder; the log of an earlier run that took a step is kept beside it."""
    folder = output_dir / FOLDER
    if folder.is_dir():
        previous = output_dir / f"_{FOLDER}.previous"
        if _has_steps(folder):
            checkpoint.clear(previous)
            os.replace(folder, previous)
        else:
            checkpoint.clear(folder)
    folder.mkdir(parents=True)
    return folder


def _has_steps(folder: Path) -> bool:
    try:
        header = read_trajectory(folder, until=0).header
        return bool(read_trajectory(folder, until=header["first_step"] + 1).records)
    except TrajectoryError:
        return (folder / FILE).exists()  # a file that cannot be read may still be worth keeping


def _save_adapter_config(model: Any, folder: Path) -> None:
    active = active_adapter(model)
    if active is not None:
        model.peft_config[active].save_pretrained(folder)
