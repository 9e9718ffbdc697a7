"""Two runs do not share an output folder; everything else that looks at it goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.runs import At, make_trainer, trained
from zo_hf.parallel.ranks import Ranks
from zo_hf.trainer import lock

CPU = torch.device("cpu")


def locked(folder: Path) -> Any:
    return lock.locked(folder, Ranks(), CPU)


def test_a_second_run_in_the_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    link = tmp_path / "link"
    (tmp_path / "run").mkdir()
    link.symlink_to(tmp_path / "run")
    second = make_trainer(link)
    refused: list[str] = []

    def start(state: Any, **kwargs: Any) -> None:
        with pytest.raises(ValueError) as error:
            second.train()
        refused.append(str(error.value))

    trained(tmp_path / "run", more={"callbacks": [At({2}, start)]})
    assert len(refused) == 1 and str(link) in refused[0] and f"process {os.getpid()}" in refused[0]
    assert refused[0].endswith("output_dir of its own.") and refused[0].count(". ") == 0
    second.train()
    assert second.state.global_step == 4


def test_runs_one_after_another_and_looks_during_a_run_are_not_blocked(tmp_path: Path) -> None:
    other = make_trainer(tmp_path)
    looks = At({2}, lambda state, **kwargs: (other.predict(other.eval_dataset), other.find_learning_rate()))
    trainer = make_trainer(tmp_path, more={"callbacks": [looks]})
    trainer.train()
    trainer.train()
    assert other.train().global_step == 4
    assert not (tmp_path / lock.FILE).exists()


def test_the_lock_ends_with_an_exception_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    with locked(tmp_path):
        assert (tmp_path / lock.FILE).exists()
    assert not (tmp_path / lock.FILE).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A worker of a data loader may live on for seconds when its run has been killed."""
    (ready, says), (waits, ends) = os.pipe(), os.pipe()
    handle, owner = lock._acquire(tmp_path / lock.FILE)
    assert handle is not None and owner is None
    child = os.fork()
    if child == 0:
        os.write(says, b"x")
        os.read(waits, 1)
        os._exit(0)
    try:
        os.read(ready, 1)
        lock._close(handle)  # as when the process is killed: nobody unlocks
        with locked(tmp_path):
            pass
    finally:
        os.write(ends, b"x")
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_written_to_is_not_locked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    entered = []
    with locked(tmp_path / "file" / "run"), locked(tmp_path / "file" / "run"):
        entered.append(True)
    assert entered and (tmp_path / "file").read_text() == "no folder"


def test_a_full_disk_has_no_room_for_the_owners_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with locked(tmp_path), pytest.raises(ValueError, match="is in use by another run"), locked(tmp_path):
        pass


def test_a_file_that_never_stays_the_same_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda first, second: False)
    entered = []
    with locked(tmp_path), locked(tmp_path):
        entered.append(True)
    assert entered
