"""The reader of logs: damage is noticed or, at the end of the file, dropped; wrong data is never handed out."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zo_hf.trajectory import Record, Trajectory, TrajectoryError, read_trajectory
from zo_hf.trajectory import log as log_module
from zo_hf.trajectory.log import VERSION, Writer, encode_header

SETTINGS: dict[str, Any] = {
    "zo_subspace": "low_rank",
    "zo_rank": 4,
    "zo_fold_steps": 50,
    "zo_eps": 1e-3,
    "zo_num_directions": 2,
    "zo_direction": "gaussian",
    "zo_max_projected_grad": 0.0,
    "zo_normalize": False,
    "seed": 0,
    "coordinates": 1,
}
HEADER: dict[str, Any] = {
    "first_step": 0,
    "directions": 2,
    "settings": SETTINGS,
    "optimizer": {"kind": "SGD", "replayable": True},
    "groups": [{"names": ["a"], "options": {}}, {"names": [], "options": {}}],
    "base": {},
}
SIZE = 4 + 1 + 8 * (2 + 2 + 1) + 4


def record(step: int, skipped: bool = False) -> Record:
    gradients = (math.nan, 1.0) if skipped else (0.1 * step, float(-step))
    return Record(step, skipped, False, gradients, (1e-3, 1e-4), 0.5)


def write(path: Path, steps: int = 6) -> Path:
    writer = Writer(path, HEADER)
    for step in range(steps):
        writer.append(record(step, skipped=step == 3))
    writer.close()
    return path


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return write(tmp_path / "whole.zolog").read_bytes()


def read_bytes(folder: Path, content: bytes) -> Trajectory:
    path = folder / "damaged.zolog"
    path.write_bytes(content)
    return read_trajectory(path)


def assert_true(trajectory: Trajectory) -> None:
    """Everything that was read was written."""
    assert trajectory.header == HEADER
    for step, read in enumerate(trajectory.records):
        assert repr(read) == repr(record(step, skipped=step == 3))


def refusal(folder: Path, content: bytes) -> str:
    with pytest.raises(TrajectoryError) as error:
        read_bytes(folder, content)
    message = str(error.value)
    assert message.endswith(".") and message.count(". ") == 0 and "\n" not in message
    assert "damaged.zolog" in message
    return message


def test_what_is_written_is_read(tmp_path: Path, content: bytes) -> None:
    trajectory = read_bytes(tmp_path, content)
    assert_true(trajectory)
    assert trajectory.steps == 6 and trajectory.dropped == 0 and len(content) == trajectory.start + 6 * SIZE
    assert len(read_trajectory(tmp_path / "whole.zolog", until=2).records) == 2


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_every_flipped_bit_is_noticed(tmp_path: Path, content: bytes, position: int, bit: int) -> None:
    position %= len(content)
    flipped = bytearray(content)
    flipped[position] ^= 1 << bit
    message = refusal(tmp_path, bytes(flipped))
    start = len(content) - 6 * SIZE
    if position >= start:
        assert f"step {(position - start) // SIZE} " in message


@FUZZ
@given(data=st.data())
def test_any_damage_leaves_true_records_or_a_refusal(tmp_path: Path, content: bytes, data: st.DataObject) -> None:
    """Several flips, then a cut, then zeros or noise at the end."""
    damaged = bytearray(content)
    for position, bit in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 7)), max_size=3)
    ):
        damaged[position] ^= 1 << bit
    cut = data.draw(st.integers(0, len(content)))
    tail = data.draw(st.one_of(st.binary(max_size=100), st.integers(0, 100).map(bytes)))
    try:
        trajectory = read_bytes(tmp_path, bytes(damaged[:cut]) + tail)
    except TrajectoryError:
        return
    assert_true(trajectory)


@FUZZ
@given(junk=st.binary(max_size=300))
def test_a_file_that_is_no_log_is_refused(tmp_path: Path, junk: bytes) -> None:
    for content in (junk, b"ZOTRAJ\r\n" + junk, struct.pack("<8sHI", b"ZOTRAJ\r\n", VERSION, len(junk)) + junk):
        with pytest.raises(TrajectoryError):
            read_bytes(tmp_path, content)


@pytest.mark.parametrize("cut", [1, SIZE // 2, SIZE - 1, SIZE + 3])
def test_a_cut_tail_is_dropped_with_a_warning(
    tmp_path: Path, content: bytes, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "zo_hf"):
        trajectory = read_bytes(tmp_path, content[:-cut])
    assert_true(trajectory)
    assert trajectory.steps == 6 - 1 - cut // SIZE and trajectory.dropped == SIZE - cut % SIZE
    assert "no complete record" in caplog.text


@pytest.mark.parametrize("kept", [0, 1, SIZE // 2, SIZE - 4])
def test_zeros_that_a_power_loss_left_are_dropped(tmp_path: Path, content: bytes, kept: int) -> None:
    whole = content[: len(content) - 3 * SIZE + kept]
    trajectory = read_bytes(tmp_path, whole + bytes(len(content) - len(whole)))
    assert_true(trajectory)
    assert trajectory.steps == 3 and trajectory.dropped == 3 * SIZE


def test_a_missing_and_a_reordered_record_are_noticed(tmp_path: Path, content: bytes) -> None:
    start = len(content) - 6 * SIZE
    rows = [content[start + i * SIZE : start + (i + 1) * SIZE] for i in range(6)]
    assert "step 2 " in refusal(tmp_path, content[:start] + b"".join(rows[:2] + rows[3:]))
    assert "step 1 " in refusal(tmp_path, content[:start] + b"".join([rows[0], rows[2], rows[1], *rows[3:]]))
    assert "step 1 " in refusal(tmp_path, content[:start] + b"".join([rows[0], *rows]))


def test_a_damaged_log_can_be_read_up_to_the_damage(tmp_path: Path, content: bytes) -> None:
    damaged = bytearray(content)
    damaged[-SIZE + 10] ^= 1
    assert "until step 5" in refusal(tmp_path, bytes(damaged))
    assert len(read_trajectory(tmp_path / "damaged.zolog", until=5).records) == 5


def test_another_format_version_is_refused(tmp_path: Path, content: bytes) -> None:
    newer = content[:8] + struct.pack("<H", VERSION + 1) + content[10:]
    assert f"format version {VERSION + 1}" in refusal(tmp_path, newer)


def with_header(header: Any) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<8sHI", b"ZOTRAJ\r\n", VERSION, len(text)) + text
    return content + struct.pack("<I", zlib.crc32(content))


@pytest.mark.parametrize(
    "header",
    [
        [],
        HEADER | {"directions": 0},
        HEADER | {"directions": 1 << 40},
        HEADER | {"directions": True},
        HEADER | {"first_step": -1},
        HEADER | {"groups": []},
        HEADER | {"groups": [1]},
        HEADER | {"groups": [{"names": [], "options": {}}] * (1 << 17)},
        HEADER | {"settings": {}},
        HEADER | {"base": math.nan},
        b"{",
        b"\xff\xff",
        b"[" * 100_000,
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, header: Any) -> None:
    assert "header" in refusal(tmp_path, with_header(header))


def test_a_header_longer_than_allowed_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "MAX_HEADER", 10)
    assert "header" in refusal(tmp_path, with_header(HEADER))
    monkeypatch.setattr(log_module, "MAX_FILE", 10)
    assert "more than 10 bytes" in refusal(tmp_path, with_header(HEADER))


@pytest.mark.parametrize(
    "change",
    [
        {"step": 7},
        {"projected_gradients": (math.inf, 0.0)},
        {"learning_rates": (math.nan, 0.0)},
        {"clip_factor": 2.0},
        {"clip_factor": math.nan},
    ],
)
def test_numbers_that_no_run_writes_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    writer = Writer(tmp_path / "a.zolog", HEADER)
    writer.append(dataclasses.replace(record(0), **change))
    writer.close()
    assert "is not valid" in refusal(tmp_path, (tmp_path / "a.zolog").read_bytes())


def test_a_log_continues_from_any_step(tmp_path: Path, content: bytes) -> None:
    for step in range(7):
        trajectory = read_trajectory(tmp_path / "whole.zolog", until=step)
        writer = Writer.resume(trajectory, step, tmp_path / "copy.zolog")
        assert writer.crc == trajectory.crc_at(step)
        for later in range(step, 6):
            writer.append(record(later, skipped=later == 3))
        writer.close()
        assert (tmp_path / "copy.zolog").read_bytes() == content


def test_records_reach_the_file_at_once_and_the_disk_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, synced = [0.0], []
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(log_module.os, "fsync", synced.append)
    writer = Writer(tmp_path / "a.zolog", HEADER)
    synced.clear()
    for step in range(12):
        writer.append(record(step))
        assert len(read_trajectory(tmp_path / "a.zolog").records) == step + 1
        now[0] += 1.0
    assert len(synced) == 1
    writer.sync()
    assert len(synced) == 2


def test_folders_are_searched_and_what_is_missing_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(TrajectoryError, match="name the output folder"):
            read_trajectory(path)
    (tmp_path / "trajectory").mkdir()
    write(tmp_path / "trajectory" / "steps.zolog")
    assert read_trajectory(tmp_path).path == read_trajectory(tmp_path / "trajectory").path


def test_the_header_is_json_that_strings_shows(content: bytes) -> None:
    assert json.dumps(HEADER).encode() in content and content.startswith(encode_header(HEADER))
