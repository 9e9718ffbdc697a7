"""The list of a checkpoint's files, by which damage and loss are seen before anything is read.

    zo_manifest.json    {"version": 1, "files": {name: [size in bytes, CRC-32]}}

It is written last, in the staging folder that then takes the checkpoint's place. Files that are added later, such as a model
card, are no damage unless a resume would read them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from zo_hf import checkpoint
from zo_hf.untrusted import plain_json

FILE = "zo_manifest.json"
VERSION = 1
#: Names of files that a resume reads if they are there, so that one of another checkpoint would change the run.
_READ_IF_THERE = re.compile(r"zo_.*|.*\.index\.json|(optimizer|scheduler|scaler)\..*|rng_state.*")
#: No resume reads the model card, which a callback may write anew.
_NOT_LISTED = (FILE, "README.md")


def write(folder: Path) -> None:
    """Write the list of all files in a folder and below it, except the model card."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in _NOT_LISTED]
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    files = {name: [(folder / name).stat().st_size, checkpoint.file_crc(folder / name)] for name in names}
    (folder / FILE).write_text(json.dumps({"version": VERSION, "files": files}, indent=1))


def is_listed(folder: Path) -> bool:
    """Return whether a checkpoint has a list of its files; those of older versions and of other programs have none."""
    return (folder / FILE).exists()


def problem_of(folder: Path) -> str | None:
    """Return why a checkpoint cannot be resumed, with the name of the file; None if it is as it was written."""
    if not is_listed(folder):
        return _problem_without_list(folder)
    listed = _read(folder / FILE)
    if isinstance(listed, str):
        return listed
    for name, (size, _) in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    more = sorted(path.name for path in folder.iterdir() if _READ_IF_THERE.fullmatch(path.name))
    for name in more:
        if name not in listed and name != FILE:
            return f"{name} was not written with it"
    for name, (_, crc) in listed.items():
        try:
            if checkpoint.file_crc(folder / name) != crc:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _problem_without_list(folder: Path) -> str | None:
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError, RecursionError):
        return f"it has no readable {TRAINER_STATE_NAME}, as if it was cut off while it was written"
    try:
        is_marked = "manifest" in checkpoint.read_state(folder)
    except ValueError:
        return f"{checkpoint.STATE_FILE} cannot be read"
    return f"{FILE} is missing" if is_marked else None


def _read(path: Path) -> dict[str, list[int]] | str:
    """Return the sizes and checksums of a list, or what is wrong with it."""
    try:
        content = plain_json.read(path)
    except (OSError, ValueError):
        return f"{path.name} cannot be read"
    if isinstance(content, dict) and content.get("version") != VERSION:
        return f"{path.name} has version {content.get('version')!r}, which this version of zo_hf does not know"
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())) or not files:
        return f"{path.name} is damaged"
    return files


def _is_entry(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
