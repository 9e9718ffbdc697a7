"""Checkpoints: the engine's files beside the model, from which a run continues with the same bits.

    model.safetensors              the model of that step, with the coordinates folded in, for `from_pretrained`
    zo_state.json                  the engine's numbers, and the settings of the run
    zo_coordinates.safetensors     the coordinates
    zo_rule.safetensors            the rule's memory, if it has one
    zo_secret                      the key of private training's noise, see `trainer/private.py`
    zo_base.safetensors            the weights as of the last fold, if the subspace folds and the coordinates are not zero

At a step that folds, the coordinates are zero and the model itself is the base, so nothing large is written twice. Several
checkpoints between two folds share one base file (a hard link). The subspaces adapter and full need no base file, because
their coordinates are the model's own weights.

With `save_only_trajectory` a checkpoint holds no tensors, only the engine's numbers and a copy of the trajectory. Resuming
replays that trajectory (see `trajectory/recorder.py`).

A checkpoint is written in a staging folder, flushed to the disk, and then renamed, so that it is complete or absent. A list
of its files goes with it (see `trainer/manifest.py`), by which later damage is seen.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME

from zo_hf.engine import ZerothOrder
from zo_hf.offload import whole_state_dict
from zo_hf.parallel.checksum import saved_hash
from zo_hf.parallel.shards import is_sharded, local_part, part_of, reshard
from zo_hf.settings import SAVED_DEFAULTS
from zo_hf.subspaces import adapter_config
from zo_hf.subspaces.adapter import Adapter
from zo_hf.subspaces.folded import Folded
from zo_hf.subspaces.low_rank import LowRank
from zo_hf.subspaces.peft_methods import computes_its_prompt, is_peft
from zo_hf.subspaces.subspace import Subspace
from zo_hf.untrusted import plain_json
from zo_hf.untrusted.fields import (
    Fits,
    brief,
    either,
    first_misfit,
    is_flag,
    is_number,
    is_object,
    is_text,
    list_of,
    maybe,
    number,
    object_of,
    one_of,
    whole,
)
from zo_hf.untrusted.tensors import read_tensors

STATE_FILE = "zo_state.json"
COORDINATES_FILE = "zo_coordinates.safetensors"
RULE_FILE = "zo_rule.safetensors"
BASE_FILE = "zo_base.safetensors"


# Numbers that follow from losses, and may overflow with them.
_MEASURED = either(is_number, lambda value: isinstance(value, float))
_STATE: dict[str, Fits] = {
    "settings": maybe(is_object),
    "engine": maybe(is_object),
    "trajectory": maybe(whole(0, (1 << 32) - 1)),
    "learning_rate": maybe(is_number),
    "learning_rates": maybe(list_of(is_number, 1)),
    "seconds": maybe(number(0.0, 1e12)),
    "drawn_at": maybe(whole(0, (1 << 32) - 1)),
    "at_origin": maybe(is_flag),
    "weights": maybe(is_text),
    "data": maybe(lambda value: object_of(whole(0, 1 << 40))(value) and value.keys() >= {"passes", "batches"}),
}
_ENGINE: dict[str, Fits] = {
    "step": whole(0, (1 << 32) - 1),
    "forward_passes": whole(),
    "skipped_steps": whole(),
    "batched": maybe(either(is_flag, one_of("auto"))),
    "pending_decay": object_of(_MEASURED),
    "normalization": maybe(lambda value: list_of(_MEASURED, 2, 2)(value) and whole()(value[1])),
    "normalisation": maybe(lambda value: list_of(_MEASURED, 2, 2)(value) and whole()(value[1])),  # as 0.1.0 spelled it
    "distribution": maybe(object_of(_MEASURED)),
    "still": maybe(list_of(is_text)),
    "row_groups": maybe(list_of(lambda value: True, 5, 7)),
    "curvature": maybe(is_object),
}


STAGING = "_unfinished-checkpoint"  # begins with _, which Trainer does not upload


class Staging:
    """The folder in which a checkpoint is written before it takes its place, so that nobody sees an incomplete one.

    Args:
        run_folder: the folder of the run's checkpoints.
        name: the name of the checkpoint's folder.
    """

    def __init__(self, run_folder: Path, name: str) -> None:
        self.run_folder = run_folder
        self.folder = run_folder / STAGING / name
        self.final = run_folder / name

    def clear(self) -> None:
        """Remove what a killed run has left, and make the folder."""
        clear(self.folder.parent)
        self.folder.mkdir(parents=True)

    def publish(self) -> None:
        """Flush the checkpoint to the disk, and then move it to its place."""
        for path in (*self.folder.rglob("*"), self.folder):
            _flush(path)
        clear(self.final)
        os.replace(self.folder, self.final)
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        _flush(self.run_folder)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # other systems cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class CheckpointWriter:
    """Writes the engine's files of checkpoints, and remembers the last base file so that the next checkpoint shares it."""

    def __init__(self) -> None:
        self._last_base: tuple[int, Path, int] | None = None

    def save(
        self,
        zo: ZerothOrder,
        folder: Path,
        entries: Mapping[str, Any] | None = None,
        learning_rates: list[float] | None = None,
        write: bool = True,
    ) -> None:
        """Write the engine's files into `folder`; the state file comes last, so that it exists only if all others do.

        Args:
            zo: the engine.
            folder: the checkpoint's folder.
            entries: what the state file says of the run around the engine, as JSON has it.
            learning_rates: learning rates of the next step, for a checkpoint without tensors; None for all others.
            write: False on processes that contribute their shards of the weights and write nothing.
        """
        base = {} if learning_rates is not None else _base_to_save(zo.subspace)
        if not write:
            return
        state: dict[str, Any] = {"settings": zo.saved_settings(), "engine": zo.state_dict(), **(entries or {})}
        if learning_rates is not None:
            state["learning_rates"] = learning_rates
        else:
            state |= self._save_tensors(zo, base, folder)
        (folder / STATE_FILE).write_text(json.dumps(state, indent=1))

    def _save_tensors(self, zo: ZerothOrder, base: dict[str, Tensor], folder: Path) -> dict[str, Any]:
        """Write the coordinates, the base and the rule's memory, as far as the model's files lack them.

        Args:
            zo: the engine.
            base: the weights as of the last fold; empty if there is no need for them.
            folder: the checkpoint's folder.

        Returns:
            What the state file says of them.
        """
        subspace, said = zo.subspace, {}
        has_coordinates = isinstance(subspace, Adapter)  # PEFT does not save every trainable tensor with every method
        if isinstance(subspace, Folded):
            said = {"drawn_at": subspace.drawn_at, "at_origin": subspace.at_origin}
            has_coordinates = not subspace.at_origin
            if base:
                self._save_base(subspace.drawn_at, base, folder / BASE_FILE)
        if has_coordinates:
            save_file(_detached(dict(subspace.coordinates)), folder / COORDINATES_FILE)
        remembered = zo.rule.state()
        if remembered:
            save_file(_detached(remembered), folder / RULE_FILE)
        return said

    def moved(self, before: Path, after: Path) -> None:
        """Take note that a folder written by `save` has moved to its final place."""
        if self._last_base is not None and self._last_base[1].parent == before:
            drawn_at, path, crc = self._last_base
            self._last_base = (drawn_at, after / path.name, crc)

    def _save_base(self, drawn_at: int, base: dict[str, Tensor], path: Path) -> None:
        if self._last_base is not None:
            last_drawn_at, previous, crc = self._last_base
            if last_drawn_at == drawn_at and previous.exists():
                try:
                    os.link(previous, path)
                except OSError:  # the file system has no hard links
                    shutil.copyfile(previous, path)
                if file_crc(path) == crc:  # else it was damaged since
                    # The previous folder may be rotated away before the next checkpoint.
                    self._last_base = (drawn_at, path, crc)
                    return
                path.unlink()
        save_file(_detached(base), path)
        self._last_base = (drawn_at, path, file_crc(path))


def _base_to_save(subspace: Subspace) -> dict[str, Tensor]:
    """Return the weights as of the last fold, if the model's own files do not hold them; else an empty dictionary."""
    # Factors that become an adapter are never folded: the base is the model that the run began with.
    keeps_base = isinstance(subspace, LowRank) and subspace.becomes_adapter
    return subspace.base_state() if isinstance(subspace, Folded) and not subspace.at_origin and not keeps_base else {}


def file_crc(path: Path) -> int:
    """Return the CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            crc = zlib.crc32(piece, crc)
    return crc


def clear(folder: Path) -> None:
    """Remove an earlier run's folder from where a checkpoint is about to be written, so that their files do not mix.

    Overwriting the files instead would damage complete checkpoints, which may share them as hard links. Of a symbolic link
    only the link is removed.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # first, so that a half-removed folder looks incomplete
    shutil.rmtree(folder, ignore_errors=True)


def load(zo: ZerothOrder, folder: Path) -> bool:
    """Load the engine's state, its coordinates and the model's base weights from `folder`, without an optimizer's state.

    Returns:
        False, with nothing changed, if the folder has no engine state.

    Raises:
        ValueError: the checkpoint was written with other settings, or is damaged; the message names the first setting that
            differs, or the file.
    """
    if not (folder / STATE_FILE).exists():
        return False
    state = read_state(folder)
    check_settings(zo, state, folder)
    _check_names(zo, state, folder)
    reshard(zo.model)
    saved = _read_tensors(zo, folder)  # all of them, before anything of the model is written
    try:
        zo.load_state_dict(state["engine"])
        if saved.rule is not None:
            zo.rule.load_state(saved.rule)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"the state in {folder} belongs to another method; resume from another checkpoint."
        ) from error
    subspace = zo.subspace
    if saved.coordinates is not None:
        with torch.no_grad():
            _copy(saved.coordinates, dict(subspace.coordinates))
    if isinstance(subspace, Folded):
        if saved.base is not None:
            subspace.load_base(saved.base)
        subspace.draw_bases(state["drawn_at"])
        subspace.coordinates_changed()
        if state["at_origin"]:
            subspace.set_origin()
    if isinstance(subspace, Adapter):  # only now, because the adapter's weights have had another dtype until training
        check_weights(zo.model, folder)
    return True


@dataclass(frozen=True)
class _SavedTensors:
    """The tensors of a checkpoint's files by name; None for a file that is not there, or that the run has no use for."""

    coordinates: dict[str, Tensor] | None
    base: dict[str, Tensor] | None
    rule: dict[str, Tensor] | None


def _read_tensors(zo: ZerothOrder, folder: Path) -> _SavedTensors:
    """Read the engine's tensors.

    Raises:
        ValueError: a file cannot be read, or does not fit this run; the message names it.
    """

    def found(file: str, like: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        return _read(folder / file, like) if like and (folder / file).exists() else None

    coordinates = found(COORDINATES_FILE, dict(zo.subspace.coordinates))
    base = found(BASE_FILE, zo.subspace.base_tensors() if isinstance(zo.subspace, Folded) else {})
    needed = {name: tensor for name, tensor in zo.rule.state().items() if name not in zo.rule.newer_state}
    rule = _read(folder / RULE_FILE, needed, whole_file=True) if (folder / RULE_FILE).exists() else None
    return _SavedTensors(coordinates, base, rule)


def weights_hash_of(model: nn.Module, state: Mapping[str, Any]) -> str | None:
    """Return the hash of what a checkpoint holds of a model: of the trainable weights only, if the model has adapters.

    Args:
        model: the model.
        state: its state dict.

    Returns:
        The hash; None if this process does not hold all of the weights.
    """
    if is_peft(model):
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        state = {name: tensor for name, tensor in state.items() if name in trainable}
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if any(tensor.is_meta or is_sharded(tensor) for tensor in tensors.values()):
        return None
    return saved_hash(tensors)


def check_weights(model: nn.Module, folder: Path) -> None:
    """Compare a model's weights with those that a checkpoint was written with, if its state file knows them.

    Raises:
        ValueError: the weights differ.
    """
    written = read_state(folder).get("weights")
    found = None if written is None else weights_hash_of(model, whole_state_dict(model))
    if found is not None and found != written:
        raise ValueError(
            f"{folder} does not give the weights that were saved there: its weights, the dtype or class of this model, or "
            "its unsaved buffers have changed; resume from another checkpoint."
        )


def load_adapter(model: nn.Module, folder: Path) -> bool:
    """Load an adapter's coordinates into its model if PEFT's own file does not hold all of them.

    Returns:
        False, with nothing changed, if PEFT's file holds them all.
    """
    path = folder / COORDINATES_FILE
    if not computes_its_prompt(model) or not path.exists():
        return False
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = _read(path, {}, whole_file=True)
    for name, tensor in saved.items():
        if name not in named or named[name].shape != tensor.shape:
            raise ValueError(f"{path} belongs to another adapter than this model's; resume from another checkpoint.")
    with torch.no_grad():
        for name, tensor in saved.items():
            named[name].copy_(tensor)
    return True


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's state file; empty if there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return {}
    try:
        # Measurements may not be finite, and Python writes them as they are.
        state: dict[str, Any] = plain_json.read(path, finite=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged; resume from another checkpoint.") from error
    wrong = first_misfit(state, _STATE) if is_object(state) else "everything"
    if wrong is None and state.get("engine") is not None:
        wrong = first_misfit(state["engine"], _ENGINE)
    if wrong is not None:
        raise ValueError(
            f"{path} is damaged, because {wrong} has a value that no run writes; resume from another checkpoint."
        )
    engine = state.get("engine", {})
    if "normalisation" in engine:  # as zo_hf 0.1.0 spelled it
        engine["normalization"] = engine.pop("normalisation")
    return state


def is_only_trajectory(folder: Path) -> bool:
    """Return whether a checkpoint holds a log instead of tensors."""
    return "learning_rates" in read_state(folder)


def holds_adapter(folder: Path) -> bool:
    """Return whether a checkpoint's model is an adapter in PEFT's format."""
    return (folder / adapter_config.FILE).exists()


def check_settings(zo: ZerothOrder, state: dict[str, Any], folder: Path) -> None:
    """Refuse a checkpoint that was written with other settings than this run's.

    Raises:
        ValueError: a setting differs; the message names the first one.
    """
    # An option that is newer than the checkpoint had no other value than its default then.
    saved = SAVED_DEFAULTS | (state.get("settings") or {})
    # The rows of a direction may follow from the other settings.
    for name, now in sorted(zo.saved_settings().items(), key=lambda item: item[0] == "zo_rows_per_direction"):
        then = saved.get(name)
        if then != now:
            raise ValueError(
                f"{folder} was written with {name}={brief(then)} and this run has {name}={now!r}; resume with the same value."
            )


def _check_names(zo: ZerothOrder, state: Mapping[str, Any], folder: Path) -> None:
    """Refuse a state that lacks what every engine needs, or names parameters that do not move.

    Raises:
        ValueError: it does; the message names the checkpoint.
    """
    engine = state.get("engine")
    names = {*engine["pending_decay"], *(engine.get("still") or ())} if engine is not None else {""}
    drawn = not isinstance(zo.subspace, Folded) or (state.get("drawn_at") is not None and "at_origin" in state)
    if not names <= set(zo.subspace.coordinates) or not drawn:
        raise ValueError(f"the state in {folder} belongs to another method; resume from another checkpoint.")


def _read(path: Path, like: Mapping[str, Tensor], whole_file: bool = False) -> dict[str, Tensor]:
    """Read a checkpoint's tensors, which must have the shapes of those that are like them.

    Args:
        path: the file.
        like: tensors with the shapes to expect, by name.
        whole_file: also return tensors that `like` lacks.

    Raises:
        ValueError: the file cannot be read, or a tensor is missing or unlike; the message names the file.
    """
    shapes = {name: tensor.shape for name, tensor in like.items()}
    try:
        tensors = read_tensors(path, shapes)
        return tensors | read_tensors(path) if whole_file else tensors
    except ValueError as error:
        raise ValueError(f"{path} does not fit this run, because {error}; resume from another checkpoint.") from error


def _detached(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _copy(source: dict[str, Tensor], target: dict[str, Any]) -> None:
    for name, tensor in target.items():
        local_part(tensor)[0].copy_(part_of(source[name], tensor))
