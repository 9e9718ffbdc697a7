"""Places that cannot be written are refused before any work, and others are left as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.runs import make_trainer
from zo_hf.trainer.output_paths import check_file, check_folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", ["file", "file/out", "file/a/out", "/proc/nowhere", "/proc", "/dev/full"])
def test_a_folder_that_cannot_be_written_is_refused(place: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"--output .* (is a file|cannot be written).*; name a folder") as refusal:
        check_folder("--output", place / name)
    assert str(refusal.value).endswith(".")
    assert (place / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["folder", "file/out", "file/a/out", "/proc/nowhere/x", "/dev/full", "/proc/x"])
def test_a_file_that_cannot_be_written_is_refused(place: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"--output .* name a file"):
        check_file("--output", place / name)


def test_what_can_be_written_is_left_as_it_was(place: Path) -> None:
    check_file("--output", place / "file")
    check_file("--output", place / "a" / "b" / "new")
    check_folder("--output", place / "c" / "d", "file", "other")
    assert (place / "file").read_text() == "kept"
    assert not any((place / "c" / "d").iterdir()) and not any((place / "a" / "b").iterdir())


def test_a_folder_in_the_place_of_a_file_of_it_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match="folder is a folder; name a file"):
        check_folder("--output", place, "file", "folder")


def test_a_run_with_checkpoints_is_refused_before_it_begins(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", save_strategy="steps")
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(ValueError, match=r"output_dir .* is a file; name a folder"):
        trainer.train()
    assert trainer.state.global_step == 0
