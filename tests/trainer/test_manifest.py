"""A checkpoint's files are compared with its list, by every process, before any is read; see also the attack suites."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import seeded, tiny_opt
from tests.trainer.runs import trained
from zo_hf.parallel.ranks import Ranks
from zo_hf.trainer import manifest
from zo_hf.trainer.resuming import to_resume

CPU = torch.device("cpu")


class OtherRank(Ranks):
    """Two ranks, of which the other one sees some checkpoints damaged; the first argument is what it would choose."""

    def __init__(self, good: list[int]) -> None:
        super().__init__()
        self.good, self.limit = good, 10**9

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bool:
            return torch.stack([tensor, torch.tensor(bool(self.good))])
        other = max((step for step in self.good if step <= self.limit), default=-1)
        self.limit = min(other, int(tensor))
        return torch.stack([tensor, torch.tensor(other)])


def write(folder: Path, step: int, damaged: bool = False) -> None:
    target = folder / f"checkpoint-{step}"
    target.mkdir(parents=True)
    (target / "trainer_state.json").write_text("{}")
    (target / "zo_state.json").write_text('{"manifest": 1}')
    manifest.write(target)
    if damaged:
        (target / "zo_state.json").write_text('{"manifest": 2}')


@pytest.mark.parametrize(
    ("bad", "other_good", "chosen"),
    [
        ([], [1, 2, 3], 3),
        ([3], [1, 2, 3], 2),
        ([], [1], 1),
        ([3], [1, 3], 1),
        ([2], [2, 1], 1),
    ],
)
def test_the_ranks_agree_on_the_last_checkpoint_that_all_see_good(
    tmp_path: Path, bad: list[int], other_good: list[int], chosen: int
) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, damaged=step in bad)
    assert to_resume(True, tmp_path, OtherRank(other_good), CPU) == tmp_path / f"checkpoint-{chosen}"


@pytest.mark.parametrize("asked", [True, "checkpoint-1"])
def test_a_rank_refuses_what_another_sees_damaged(tmp_path: Path, asked: Any) -> None:
    write(tmp_path, 1)
    with pytest.raises(ValueError, match="other process") as refusal:
        to_resume(asked if asked is True else str(tmp_path / asked), tmp_path, OtherRank([]), CPU)
    assert str(refusal.value).count(". ") == 0


def test_what_is_passed_over_is_said_with_the_reason_and_nothing_good_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2, damaged=True)
    with caplog.at_level(logging.WARNING, "zo_hf"):
        assert to_resume(True, tmp_path, Ranks(), CPU) == tmp_path / "checkpoint-1"
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'checkpoint-2'} is skipped, because zo_state.json has changed since it was written"
    ]
    (tmp_path / "checkpoint-1" / manifest.FILE).unlink()
    with pytest.raises(ValueError, match=r"no intact checkpoint in .* \(checkpoint-2: zo_state.json has changed"):
        to_resume(True, tmp_path, Ranks(), CPU)


def test_a_checkpoint_without_a_list_is_said_not_to_be_checked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path, seeded(tiny_opt), max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True)
    (tmp_path / "checkpoint-1" / manifest.FILE).unlink()  # as in a stock Trainer's
    with caplog.at_level(logging.WARNING, "zo_hf"):
        assert to_resume(True, tmp_path, Ranks(), CPU) == tmp_path / "checkpoint-1"
    assert caplog.text.count("its files are not checked") == 1
