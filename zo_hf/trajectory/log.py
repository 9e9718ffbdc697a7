"""The trajectory file: a header, then a record of fixed size for every optimizer step.

    magic            8 bytes    "ZOTRAJ" and a line end that a transfer as text would change
    format version   u16        1
    header length    u32
    header           JSON       see `header.py`; contains q and g, which determine the size of a record
    CRC-32           u32        of everything before it
    record           u32        step
                     u8         flags: 1 skipped, 2 unfaithful (see `Record`), 4 begins
                     f64 × q    projected gradients, and the other numbers of a step, see `ZerothOrder.numbers`
                     f64 × g    learning rates of the parameter groups
                     f64        clip factor
                     u32        CRC-32 of this record, continued from the CRC-32 before it

A record with the flag "begins" precedes the record of its step. Its first number is the index, in the header's "still",
of a parameter that moves from this step on; its other numbers are 0.

All numbers are little-endian. Records have no length field that a flipped bit could corrupt. The CRCs form a chain,
which a missing, repeated or misplaced record breaks.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any

from zo_hf.trajectory.header_check import MAX_PER_STEP, why_unusable
from zo_hf.untrusted import plain_json

logger = logging.getLogger(__name__)

FOLDER, FILE = "trajectory", "steps.zolog"

MAGIC = b"ZOTRAJ\r\n"
VERSION = 1
# A record is synced to the disk at the next checkpoint, or with the first record written this many seconds after a
# sync.
SYNC_SECONDS = 5.0
MAX_HEADER = plain_json.MAX_BYTES
MAX_FILE = 4 << 30

SKIPPED, UNFAITHFUL, BEGINS = 1, 2, 4
# Numbers from here on are infinite in float32. torch refuses a factor that is, and a run skips a step that has one.
FLOAT32_OVERFLOW = 2.0**128 - 2.0**103
# Far above every learning rate that trains, and far enough below the overflow for what optimizers multiply it with.
MAX_RATE = 1e20
_PREFIX = struct.Struct("<8sHI")
_CRC = struct.Struct("<I")


class TrajectoryError(ValueError):
    """A log that cannot be read or replayed; the message says why and what to do."""


@dataclass(frozen=True)
class Record:
    """One optimizer step.

    Args:
        step: number of the step, from 0.
        skipped: True if a loss or projected gradient was not finite and nothing was applied.
        unfaithful: True if the optimizer's settings differed from those in the header, so that a replay is wrong from
            here.
        projected_gradients: c of every direction, as estimated.
        learning_rates: learning rate of every parameter group.
        clip_factor: factor by which the estimate was multiplied.
        begins: indices, in the header's "still", of the parameters that move from this step on.
    """

    step: int
    skipped: bool
    unfaithful: bool
    projected_gradients: tuple[float, ...]
    learning_rates: tuple[float, ...]
    clip_factor: float
    begins: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trajectory:
    """The content of a log.

    Args:
        path: the file.
        header: the run's settings, see `header.py`.
        start: byte position of the first record in the file.
        records: one record for every step, from `first_step` on.
        crcs: the CRC-32 of the header and of every record; the one after a step identifies everything up to it.
        ends: byte positions at which the header and every record end.
        dropped: number of bytes at the end that form no complete record.
    """

    path: Path
    header: dict[str, Any]
    start: int
    records: list[Record]
    crcs: list[int]
    ends: list[int]
    dropped: int = 0

    @property
    def first_step(self) -> int:
        """The step of the first record; 0 if the log begins at the base model."""
        return self.header["first_step"]

    @property
    def steps(self) -> int:
        """The number of the step after the last record."""
        return self.first_step + len(self.records)

    def crc_at(self, step: int) -> int | None:
        """Return the CRC-32 after `step` steps, or None if the log does not hold them."""
        return self.crcs[step - self.first_step] if self.first_step <= step <= self.steps else None


class Writer:
    """Appends records to a log, each written at once and synced to the disk as `SYNC_SECONDS` says.

    Args:
        path: the file; an existing one is replaced.
        header: the run's settings, see `header.py`.

    Raises:
        ValueError: a step has more numbers than a log can hold.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        if header["directions"] > MAX_PER_STEP:
            raise ValueError(
                f"a step has {header['directions']} numbers, and a log holds at most {MAX_PER_STEP}; use a smaller "
                "zo_num_directions."
            )
        content = encode_header(header)
        self._struct = _record_struct(header["directions"], len(header["groups"]))
        self.crc = _CRC.unpack(content[-_CRC.size :])[0]
        self._begin(path, content)

    @classmethod
    def resume(cls, trajectory: Trajectory, step: int, path: Path) -> Writer:
        """Continue a log after `step` steps, and drop its later records.

        Args:
            trajectory: the log to continue.
            step: number of steps to keep.
            path: the file to write; if it is not the log's own, it begins as a copy.
        """
        writer = cls.__new__(cls)
        crc = trajectory.crc_at(step)
        assert crc is not None
        writer._struct, writer.crc = record_struct(trajectory.header), crc
        end = trajectory.ends[step - trajectory.first_step]
        writer._begin(path, trajectory.path.read_bytes()[:end])
        return writer

    def _begin(self, path: Path, content: bytes) -> None:
        # Written to a temporary file and renamed, so that a kill leaves either the old log or the new one.
        temporary = path.with_name(path.name + ".new")
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self.path = path
        self._file = path.open("ab", buffering=0)
        self.sync()

    def append(self, record: Record) -> None:
        """Write one record."""
        flags = SKIPPED * record.skipped | UNFAITHFUL * record.unfaithful
        numbers = (*record.projected_gradients, *record.learning_rates, record.clip_factor)
        rest = (0.0,) * (len(numbers) - 1)
        bodies = [self._struct.pack(record.step, BEGINS, float(index), *rest) for index in record.begins]
        bodies.append(self._struct.pack(record.step, flags, *numbers))
        content = b""
        for body in bodies:
            self.crc = zlib.crc32(body, self.crc)
            content += body + _CRC.pack(self.crc)
        if self._file.write(content) != len(content):
            raise OSError(errno.ENOSPC, "a record was not written completely")
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Sync all records to the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close the file."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def encode_header(header: dict[str, Any]) -> bytes:
    """Return the content of the file up to its first record."""
    text = json.dumps(header, allow_nan=False).encode()
    content = _PREFIX.pack(MAGIC, VERSION, len(text)) + text
    return content + _CRC.pack(zlib.crc32(content))


def record_struct(header: dict[str, Any]) -> struct.Struct:
    """Return the layout of a record, without its CRC-32."""
    return _record_struct(header["directions"], len(header["groups"]))


def _record_struct(directions: int, groups: int) -> struct.Struct:
    return struct.Struct(f"<IB{directions + groups + 1}d")


def read_trajectory(path: str | Path, until: int | None = None) -> Trajectory:
    """Read a log and verify every byte of it.

    Args:
        path: the file, or a folder that holds one: a run's output folder, or a checkpoint.
        until: read only the records before this step; None reads all.

    Raises:
        TrajectoryError: there is no log, or it is damaged or of another format; the message says where.
    """
    path = find_log(Path(path))
    try:
        if path.stat().st_size > MAX_FILE:
            raise TrajectoryError(
                f"{path} has more than {MAX_FILE} bytes and is not a trajectory; name a run's output folder."
            )
        content = path.read_bytes()
    except OSError as error:
        raise TrajectoryError(f"{path} cannot be read ({error.strerror}); name a trajectory.") from error
    header, start = _parse_header(path, content)
    return _parse_records(path, header, content, start, until)


def find_log(path: Path) -> Path:
    """Return the log file for a path: the file itself, or the one in a run's folder, a checkpoint or a log's folder.

    Raises:
        TrajectoryError: the path leads to no log.
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
    """Return the header, and the byte position of the first record."""
    if len(content) < _PREFIX.size or not content.startswith(MAGIC):
        raise TrajectoryError(
            f"{path} is not a trajectory, because it does not begin with {MAGIC!r}; name a run's output folder."
        )
    _, version, length = _PREFIX.unpack_from(content)
    if version != VERSION:
        raise TrajectoryError(
            f"{path} has format version {version}, and this version of zo_hf reads {VERSION}; use the version of zo_hf "
            "that wrote it, or a newer one."
        )
    end = _PREFIX.size + length
    if length > MAX_HEADER or end + _CRC.size > len(content):
        raise TrajectoryError(f"{path} is cut off or damaged within its header; use another copy of it.")
    if zlib.crc32(content[:end]) != _CRC.unpack_from(content, end)[0]:
        raise TrajectoryError(f"the header of {path} is damaged; use another copy of it.")
    try:
        header = plain_json.parse(content[_PREFIX.size : end])
        reason = why_unusable(header)
    except ValueError as error:
        reason = str(error)
    if reason is not None:
        raise TrajectoryError(
            f"the header of {path} is not one that zo_hf writes, because {reason}; use another copy of it."
        )
    return header, end + _CRC.size


def _parse_records(path: Path, header: dict[str, Any], content: bytes, start: int, until: int | None) -> Trajectory:
    layout = record_struct(header)
    size = layout.size + _CRC.size
    directions = header["directions"]
    crcs = [_CRC.unpack_from(content, start - _CRC.size)[0]]
    ends, crc_before = [start], crcs[0]
    records: list[Record] = []
    begins: list[int] = []
    begun: set[int] = set()
    position, step = start, header["first_step"]
    while len(content) - position >= size and (until is None or step < until):
        body = content[position : position + layout.size]
        crc = _CRC.unpack_from(content, position + layout.size)[0]
        if crc != zlib.crc32(body, crc_before):
            if not any(content[position + layout.size :]):  # a power loss can leave zeros at the end of a file
                break
            raise TrajectoryError(
                f"the record of step {step} in {path} is damaged, or does not belong there; use another copy of the file, "
                f"or replay until step {step}."
            )
        crc_before = crc
        position += size
        number, flags, *numbers = layout.unpack(body)
        index = _index_of_begin(numbers, len(header.get("still") or ())) if flags == BEGINS else None
        if index is not None and number == step and index not in begun:
            begun.add(index)
            begins.append(index)
            continue
        gradients, rates, clip = tuple(numbers[:directions]), tuple(numbers[directions:-1]), numbers[-1]
        record = Record(step, bool(flags & SKIPPED), bool(flags & UNFAITHFUL), gradients, rates, clip, tuple(begins))
        if number != step or flags & ~(SKIPPED | UNFAITHFUL) or not _is_possible(record):
            raise TrajectoryError(
                f"the record of step {step} in {path} is not valid, so zo_hf did not write it; use another copy of the file."
            )
        records.append(record)
        begins = []
        crcs.append(crc)
        ends.append(position)
        step += 1
    dropped = len(content) - ends[-1] if until is None or step < until else 0
    if dropped:
        logger.warning("%s ends in %d bytes that form no complete record; they are ignored", path, dropped)
    return Trajectory(path, header, start, records, crcs, ends, dropped)


def _index_of_begin(numbers: Sequence[float], still: int) -> int | None:
    """Return the index of a parameter that begins to move; None if no such record has these numbers.

    Args:
        numbers: the numbers of a record with the flag "begins".
        still: the number of parameters in the header's "still".
    """
    is_index = 0 <= numbers[0] < still and numbers[0] == int(numbers[0])
    return int(numbers[0]) if is_index and not any(numbers[1:]) else None


def _is_possible(record: Record) -> bool:
    """Return whether a step can have these numbers: those that overflow float32, or a step, are never applied."""
    if not all(abs(rate) <= MAX_RATE for rate in record.learning_rates) or not 0 <= record.clip_factor <= 1:
        return False
    if record.skipped:
        return True
    largest = max(map(abs, record.learning_rates))
    sizes = [abs(c) for c in record.projected_gradients]
    return all(size < FLOAT32_OVERFLOW for size in sizes) and largest * fsum(sizes) < FLOAT32_OVERFLOW
