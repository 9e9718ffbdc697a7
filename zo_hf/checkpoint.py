"""What a checkpoint holds beside the model: enough to continue with the same bits.

    model.safetensors              the model of that step, coordinates folded in: loads with `from_pretrained`
    zo_state.json                  the engine's numbers, and the settings they belong to
    zo_coordinates.safetensors     the coordinates
    zo_rule.safetensors            what the rule remembers, where it does
    zo_base.safetensors            the weights as of the last fold; only where the coordinates are not zero, and are folded

At a step that folds, the coordinates are zero and the model itself is the base: nothing large is written twice. Several
checkpoints between two folds share one base file (a hard link). The adapter subspace needs none of this, nor does full:
their coordinates are the model's own weights.

With `save_only_trajectory` there are no tensors: only the engine's numbers and a copy of the trajectory, from which the
rest is replayed (see `trajectory/recorder.py`).

It is written in a folder of its own, flushed to the disk, and then renamed: a checkpoint is whole or not there. Folders of
other origin may be cut off; Trainer writes its trainer_state.json after everything else, so one in which that file is
readable is complete.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from zo_hf.directions import Layers
from zo_hf.sharding import local_part, part_of, reshard
from zo_hf.subspaces.adapter import Adapter
from zo_hf.subspaces.folded import Folded
from zo_hf.subspaces.low_rank import LowRank
from zo_hf.subspaces.peft_methods import computes_its_prompt
from zo_hf.zeroth_order import ZerothOrder

logger = logging.getLogger(__name__)

STATE_FILE = "zo_state.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"  # PEFT's
COORDINATES_FILE = "zo_coordinates.safetensors"
RULE_FILE = "zo_rule.safetensors"
BASE_FILE = "zo_base.safetensors"


STAGING = "_unfinished-checkpoint"  # begins with _, which Trainer does not upload


class Staging:
    """Where a checkpoint is written before it takes its place, so that nobody ever sees a part of one.

    Args:
        run_folder: where the run keeps its checkpoints.
        name: the checkpoint's.
    """

    def __init__(self, run_folder: Path, name: str) -> None:
        self.run_folder = run_folder
        self.folder = run_folder / STAGING / name
        self.final = run_folder / name

    def clear(self) -> None:
        """Remove what a run that was killed has left."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def publish(self) -> None:
        """Move the checkpoint to its place; only what is safely on the disk goes there."""
        for path in (*self.folder.rglob("*"), self.folder):
            _flush(path)
        clear(self.final)
        os.replace(self.folder, self.final)
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        _flush(self.run_folder)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # where a folder cannot be opened
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class CheckpointWriter:
    """Writes an engine's part of checkpoints, and remembers the last base file so that the next can share it."""

    def __init__(self) -> None:
        self._last_base: tuple[int, Path] | None = None

    def save(
        self,
        zo: ZerothOrder,
        folder: Path,
        trajectory: int | None = None,
        learning_rates: list[float] | None = None,
        seconds: float = 0.0,
        write: bool = True,
        found_learning_rate: float | None = None,
    ) -> None:
        """Write the engine's files into `folder`; the state file comes last, so that its presence means the rest.

        Args:
            trajectory: the CRC that the chain of the run's log has at this step.
            learning_rates: of the next step, where the checkpoint holds no tensors and no optimizer.
            seconds: how long the run has taken so far.
            write: False on the processes that are only needed for their shards of the weights.
            found_learning_rate: what `learning_rate="auto"` has found, for the run that is resumed.
        """
        subspace = zo.subspace
        base: dict[str, Tensor] = {}
        # What becomes an adapter never writes its base, and nothing else does.
        keeps_base = isinstance(subspace, LowRank) and subspace.becomes_adapter
        if learning_rates is None and isinstance(subspace, Folded) and not subspace.at_origin and not keeps_base:
            base = subspace.base_state()
        if not write:
            return
        state: dict[str, Any] = {"settings": settings(zo), "engine": zo.state_dict(), "trajectory": trajectory}
        state["seconds"] = seconds
        if found_learning_rate is not None:
            state["learning_rate"] = found_learning_rate
        if learning_rates is not None:
            state["learning_rates"] = learning_rates
        elif isinstance(subspace, Folded):
            state["drawn_at"] = subspace.drawn_at
            state["at_origin"] = subspace.at_origin
            if not subspace.at_origin:
                save_file(_detached(dict(subspace.coordinates)), folder / COORDINATES_FILE)
                if base:
                    self._save_base(subspace.drawn_at, base, folder / BASE_FILE)
        elif isinstance(subspace, Adapter):
            # PEFT saves what its method needs, not always every trainable tensor: keep the coordinates themselves.
            save_file(_detached(dict(subspace.coordinates)), folder / COORDINATES_FILE)
        remembered = zo.rule.state()
        if remembered and learning_rates is None:
            save_file(_detached(remembered), folder / RULE_FILE)
        (folder / STATE_FILE).write_text(json.dumps(state, indent=1))

    def moved(self, before: Path, after: Path) -> None:
        """To be told when a folder written by `save` gets its final place."""
        if self._last_base is not None and self._last_base[1].parent == before:
            self._last_base = (self._last_base[0], after / self._last_base[1].name)

    def _save_base(self, drawn_at: int, base: dict[str, Tensor], path: Path) -> None:
        if self._last_base is not None:
            last_drawn_at, previous = self._last_base
            if last_drawn_at == drawn_at and previous.exists():
                try:
                    os.link(previous, path)
                except OSError:  # a file system without hard links
                    shutil.copyfile(previous, path)
                self._last_base = (drawn_at, path)  # the previous folder may be rotated away before the next
                return
        save_file(_detached(base), path)
        self._last_base = (drawn_at, path)


def to_resume(asked: str | bool | None, output_dir: str) -> str | bool | None:
    """The checkpoint folder to resume from: the one asked for, or for True the last complete one in `output_dir`.

    Raises:
        ValueError: the folder asked for, or every one there is, was cut off while it was written.
    """
    if asked is True:
        folders = _folders(Path(output_dir))
        for folder in folders:
            if is_complete(folder):
                return str(folder)
            logger.warning("%s was cut off while it was written; resuming from the checkpoint before it", folder)
        if folders:
            raise ValueError(f"resume_from_checkpoint=True finds no complete checkpoint in {output_dir}; start anew.")
    elif asked and Path(asked).is_dir() and not is_complete(Path(asked)):
        raise ValueError(
            f"resume_from_checkpoint={str(asked)!r} has no readable {TRAINER_STATE_NAME}, so it was cut off while it was "
            "written; pass resume_from_checkpoint=True for the last complete one."
        )
    return asked


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def clear(folder: Path) -> None:
    """Remove what an earlier run left where a checkpoint is about to be written: nothing of it may mix with the new.

    Its files may be hard links that complete checkpoints share, so they must not be written over either.
    """
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # first: what is half removed must not look complete
    shutil.rmtree(folder, ignore_errors=True)


def _folders(output_dir: Path) -> list[Path]:
    """Trainer's checkpoint folders, the last step's first."""
    steps = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if number and folder.is_dir():
            steps[int(number[1])] = folder
    return [steps[step] for step in sorted(steps, reverse=True)]


def load(zo: ZerothOrder, folder: Path) -> bool:
    """Put the engine, its coordinates and the model's base weights in the state that `folder` holds.

    The optimizer's state is not part of it. Returns False, and changes nothing, where the folder has no engine state.

    Raises:
        ValueError: the checkpoint was written with other settings; the message names the first that differs.
    """
    if not (folder / STATE_FILE).exists():
        return False
    state = read_state(folder)
    check_settings(zo, state, folder)
    subspace = zo.subspace
    reshard(zo.model)
    with torch.no_grad():
        if (folder / COORDINATES_FILE).exists():
            _copy(load_file(folder / COORDINATES_FILE), dict(subspace.coordinates))
        if (folder / BASE_FILE).exists() and isinstance(subspace, Folded):
            _copy(load_file(folder / BASE_FILE), subspace.base_tensors())
    if isinstance(subspace, Folded):
        subspace.draw_bases(state["drawn_at"])
        subspace.coordinates_changed()
        if state["at_origin"]:
            subspace.set_origin()
    zo.load_state_dict(state["engine"])
    if (folder / RULE_FILE).exists():
        zo.rule.load_state(load_file(folder / RULE_FILE))
    return True


def load_adapter(model: nn.Module, folder: Path) -> bool:
    """Put an adapter's coordinates into its model, where PEFT's own file does not hold all of them.

    Returns False, and changes nothing, where they all come from PEFT's file.
    """
    path = folder / COORDINATES_FILE
    if not computes_its_prompt(model) or not path.exists():
        return False
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(path).items():
            named[name].copy_(tensor)
    return True


def read_state(folder: Path) -> dict[str, Any]:
    """The engine's numbers in a checkpoint; none where it has none."""
    path = folder / STATE_FILE
    try:
        state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged; resume from another checkpoint.") from error
    return state


def is_only_trajectory(folder: Path) -> bool:
    """Whether a checkpoint holds a log in place of tensors."""
    return "learning_rates" in read_state(folder)


def holds_adapter(folder: Path) -> bool:
    """Whether a checkpoint's model is an adapter in PEFT's format."""
    return (folder / ADAPTER_CONFIG_NAME).exists()


def check_settings(zo: ZerothOrder, state: dict[str, Any], folder: Path) -> None:
    """Refuse a checkpoint that was written with other settings than this run's.

    Raises:
        ValueError: the message names the first that differs.
    """
    for name, now in settings(zo).items():
        then = state["settings"].get(name)
        if then != now:
            raise ValueError(
                f"{folder} was written with {name}={then!r} and this run has {name}={now!r}; resume with the same value."
            )


def settings(zo: ZerothOrder) -> dict[str, Any]:
    """What must be the same for a run to continue, under the names of the options."""
    subspace = zo.subspace
    low_rank = subspace if isinstance(subspace, LowRank) else None
    return {
        "zo_subspace": subspace.name,
        "zo_rank": low_rank.rank if low_rank else None,
        "zo_fold_steps": low_rank.fold_steps if low_rank else None,
        "zo_eps": zo.estimator.eps,
        "zo_estimator": zo.estimator.name,
        "zo_num_directions": zo.estimator.num_directions,
        "zo_direction": zo.direction,
        "zo_active_layers": zo.distribution.active if isinstance(zo.distribution, Layers) else None,
        "zo_rule": zo.rule.name,
        "zo_max_projected_grad": zo.max_projected_grad,
        "zo_normalize": zo.normalisation is not None,
        "seed": zo.seed,
        "coordinates": subspace.dimension,
        "zo_coordinate_order": zo.coordinate_order if zo.estimator.along_coordinates else None,
        **zo.rule.settings(),
    }


def _detached(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _copy(source: dict[str, Tensor], target: dict[str, Any]) -> None:
    for name, tensor in target.items():
        local_part(tensor)[0].copy_(part_of(source[name], tensor))
