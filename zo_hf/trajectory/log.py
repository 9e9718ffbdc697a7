"""The file of a trajectory: one header, then a record of fixed size for every optimizer step.

    magic            8 bytes    "ZOTRAJ" and a line end that a transfer as text would change
    format version   u16        1
    header length    u32
    header           JSON       see `header.py`; q and g, from which the size of a record follows, are in it
    CRC-32           u32        of everything before it
    record           u32        step
                     u8         flags: 1 skipped, 2 unfaithful (see `Record`)
                     f64 × q    projected gradients, and what else a step is made of, see `ZerothOrder.numbers`
                     f64 × g    learning rates of the parameter groups
                     f64        clip factor
                     u32        CRC-32 of this record, continued from the CRC-32 before it

All numbers are little-endian. No record says how long it is, so no flipped bit can make one swallow its neighbours; the
CRCs are a chain, so a record that is missing, repeated or out of order breaks it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import struct
import time
import zlib
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FOLDER, FILE = "trajectory", "steps.zolog"

MAGIC = b"ZOTRAJ\r\n"
VERSION = 1
# A log reaches the disk at every checkpoint, and otherwise at most this many seconds after it was written.
SYNC_SECONDS = 5.0
MAX_HEADER = 16 << 20
MAX_PER_STEP = 1 << 16
MAX_FILE = 4 << 30

SKIPPED, UNFAITHFUL = 1, 2
_SETTINGS = (
    "zo_subspace",
    "zo_rank",
    "zo_fold_steps",
    "zo_eps",
    "zo_num_directions",
    "zo_direction",
    "zo_max_projected_grad",
    "zo_normalize",
    "seed",
    "coordinates",
)
_PREFIX = struct.Struct("<8sHI")
_CRC = struct.Struct("<I")


class TrajectoryError(ValueError):
    """A log that cannot be read or replayed; the message says why and what to do."""


@dataclass(frozen=True)
class Record:
    """One optimizer step.

    Args:
        step: its number, from 0.
        skipped: a loss or projected gradient was not finite and nothing was applied.
        unfaithful: the optimizer's settings were not those of the header, so a replay would go wrong from here on.
        projected_gradients: c of every direction, as estimated.
        learning_rates: of every parameter group.
        clip_factor: what the estimate was multiplied by.
    """

    step: int
    skipped: bool
    unfaithful: bool
    projected_gradients: tuple[float, ...]
    learning_rates: tuple[float, ...]
    clip_factor: float


@dataclass(frozen=True)
class Trajectory:
    """What a log holds.

    Args:
        path: its file.
        header: the run's settings, see `header.py`.
        records: one for every step, from `first_step` on.
        start: where in the file the first record begins.
        crcs: of the header and of every record; the chain up to a step identifies everything before it.
        dropped: bytes at the end that were no complete record.
    """

    path: Path
    header: dict[str, Any]
    start: int
    records: list[Record]
    crcs: list[int]
    dropped: int = 0

    @property
    def first_step(self) -> int:
        """The step of the first record: 0 where the log begins at the base model."""
        return self.header["first_step"]

    @property
    def steps(self) -> int:
        """The step after the last record."""
        return self.first_step + len(self.records)

    def crc_at(self, step: int) -> int | None:
        """The chain's value after `step` steps, or None where the log does not hold them."""
        return self.crcs[step - self.first_step] if self.first_step <= step <= self.steps else None


class Writer:
    """Appends records to a log, each handed to the system at once; see `SYNC_SECONDS` for when they reach the disk.

    Args:
        path: the file; it is begun anew.
        header: see `header.py`.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        if header["directions"] > MAX_PER_STEP:
            raise ValueError(
                f"a step of {header['directions']} numbers is more than the {MAX_PER_STEP} that a log holds; use a smaller "
                "zo_num_directions."
            )
        content = encode_header(header)
        self._struct = _record_struct(header["directions"], len(header["groups"]))
        self.crc = _CRC.unpack(content[-_CRC.size :])[0]
        self._begin(path, content)

    @classmethod
    def resume(cls, trajectory: Trajectory, step: int, path: Path) -> Writer:
        """Continue a log after `step` steps, dropping what it holds beyond them.

        Args:
            path: where to; another file than the log's gets a copy.
        """
        writer = cls.__new__(cls)
        crc = trajectory.crc_at(step)
        assert crc is not None
        writer._struct, writer.crc = record_struct(trajectory.header), crc
        records = (writer._struct.size + _CRC.size) * (step - trajectory.first_step)
        writer._begin(path, trajectory.path.read_bytes()[: trajectory.start + records])
        return writer

    def _begin(self, path: Path, content: bytes) -> None:
        # Beside the file and then in its place: a kill leaves either the log that was there or the one that begins.
        beside = path.with_name(path.name + ".new")
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        self.path = path
        self._file = path.open("ab", buffering=0)
        self.sync()

    def append(self, record: Record) -> None:
        """Write one record."""
        flags = SKIPPED * record.skipped | UNFAITHFUL * record.unfaithful
        numbers = (*record.projected_gradients, *record.learning_rates, record.clip_factor)
        body = self._struct.pack(record.step, flags, *numbers)
        self.crc = zlib.crc32(body, self.crc)
        content = body + _CRC.pack(self.crc)
        if self._file.write(content) != len(content):
            raise OSError(errno.ENOSPC, "a record was not written whole")
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Have everything written so far on the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync, and let go of the file."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def encode_header(header: dict[str, Any]) -> bytes:
    """The file up to its first record."""
    text = json.dumps(header, allow_nan=False).encode()
    content = _PREFIX.pack(MAGIC, VERSION, len(text)) + text
    return content + _CRC.pack(zlib.crc32(content))


def record_struct(header: dict[str, Any]) -> struct.Struct:
    """A record without its CRC."""
    return _record_struct(header["directions"], len(header["groups"]))


def _record_struct(directions: int, groups: int) -> struct.Struct:
    return struct.Struct(f"<IB{directions + groups + 1}d")


def read_trajectory(path: str | Path, until: int | None = None) -> Trajectory:
    """Read a log and check every byte of it.

    Args:
        path: the file, or a folder that holds one: a run's output folder, or a checkpoint.
        until: read no more than the records before this step.

    Raises:
        TrajectoryError: there is no log, or it is damaged or of another format; the message says where.
    """
    path = find_log(Path(path))
    try:
        if path.stat().st_size > MAX_FILE:
            raise TrajectoryError(f"{path} has more than {MAX_FILE} bytes, so it is no trajectory.")
        content = path.read_bytes()
    except OSError as error:
        raise TrajectoryError(f"{path} cannot be read ({error.strerror}); name a trajectory.") from error
    header, start = _parse_header(path, content)
    return _parse_records(path, header, content, start, until)


def find_log(path: Path) -> Path:
    """The file that `path` means: itself, or the log in a run's folder, a checkpoint, or a trajectory's own folder.

    Raises:
        TrajectoryError: there is none.
    """
    if path.is_dir():
        for candidate in (path / FOLDER / FILE, path / FILE):
            if candidate.is_file():
                return candidate
        raise TrajectoryError(f"{path} holds no {FOLDER}/{FILE}; name the output folder of a run.")
    if not path.is_file():
        raise TrajectoryError(f"{path} does not exist; name the output folder of a run, or the file in it.")
    return path


def _parse_header(path: Path, content: bytes) -> tuple[dict[str, Any], int]:
    """The header, and where the first record begins."""
    if len(content) < _PREFIX.size or not content.startswith(MAGIC):
        raise TrajectoryError(f"{path} is no trajectory: it does not begin with {MAGIC!r}.")
    _, version, length = _PREFIX.unpack_from(content)
    if version != VERSION:
        raise TrajectoryError(
            f"{path} has format version {version} and this zo_hf reads version {VERSION}; read it with the version of "
            "zo_hf that wrote it, or a newer one."
        )
    end = _PREFIX.size + length
    if length > MAX_HEADER or end + _CRC.size > len(content):
        raise TrajectoryError(f"{path} is cut off or damaged within its header; take another copy of it.")
    if zlib.crc32(content[:end]) != _CRC.unpack_from(content, end)[0]:
        raise TrajectoryError(f"the header of {path} is damaged; take another copy of it.")
    try:
        header = json.loads(content[_PREFIX.size : end], parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise TrajectoryError(f"the header of {path} is not valid JSON; zo_hf did not write it.") from error
    if not _is_sane(header):
        raise TrajectoryError(f"the header of {path} lacks what a replay needs; zo_hf did not write it.")
    return header, end + _CRC.size


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _is_sane(header: Any) -> bool:
    if not isinstance(header, dict):
        return False
    directions, groups, first = header.get("directions"), header.get("groups"), header.get("first_step")
    sections = [header.get(name) for name in ("settings", "optimizer", "base")]
    return (
        type(directions) is int
        and 1 <= directions <= MAX_PER_STEP
        and type(first) is int
        and 0 <= first < 1 << 32
        and isinstance(groups, list)
        and 1 <= len(groups) <= MAX_PER_STEP
        and all(isinstance(group, dict) and isinstance(group.get("names"), list) for group in groups)
        and all(isinstance(group.get("options"), dict) for group in groups)
        and all(isinstance(section, dict) for section in sections)
        and all(name in header["settings"] for name in _SETTINGS)
    )


def _parse_records(path: Path, header: dict[str, Any], content: bytes, start: int, until: int | None) -> Trajectory:
    layout = record_struct(header)
    size = layout.size + _CRC.size
    directions = header["directions"]
    crcs = [_CRC.unpack_from(content, start - _CRC.size)[0]]
    records: list[Record] = []
    position = start
    while len(content) - position >= size and (until is None or header["first_step"] + len(records) < until):
        step = header["first_step"] + len(records)
        body = content[position : position + layout.size]
        crc = _CRC.unpack_from(content, position + layout.size)[0]
        if crc != zlib.crc32(body, crcs[-1]):
            if not any(content[position + layout.size :]):  # what a power loss leaves of the last blocks of a file
                break
            raise TrajectoryError(
                f"the record of step {step} in {path} is damaged, or not the one that was written there; take another "
                f"copy of the file, or replay until step {step}."
            )
        number, flags, *numbers = layout.unpack(body)
        gradients, rates, clip = numbers[:directions], numbers[directions:-1], numbers[-1]
        skipped = bool(flags & SKIPPED)
        usable = (skipped or all(map(isfinite, gradients))) and all(map(isfinite, rates)) and 0 <= clip <= 1
        if number != step or flags & ~(SKIPPED | UNFAITHFUL) or not usable:
            raise TrajectoryError(f"the record of step {step} in {path} makes no sense; zo_hf did not write it.")
        records.append(Record(step, skipped, bool(flags & UNFAITHFUL), tuple(gradients), tuple(rates), clip))
        crcs.append(crc)
        position += size
    dropped = len(content) - position if until is None or header["first_step"] + len(records) < until else 0
    if dropped:
        logger.warning("%s ends in %d bytes that are no complete record; they are left out", path, dropped)
    return Trajectory(path, header, start, records, crcs, dropped)
