"""The progress bar of a comparison, on constructed runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.comparison.test_schedule import comparison, made_up
from zo_hf.comparison import schedule
from zo_hf.comparison.job import Job
from zo_hf.comparison.processes import InThisProcess
from zo_hf.comparison.progress_bar import ProgressBar
from zo_hf.comparison.schedule import Comparison, run_all


def test_it_names_the_run_under_way_and_ends_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schedule, "run", made_up)
    one = comparison(tmp_path)
    names: list[str] = []
    with ProgressBar([one]) as bar:

        def starts(comparison: Comparison, job: Job) -> None:
            bar.starts(comparison, job)
            names.append(bar.bar.desc)

        run_all([one], InThisProcess(), 1, starts, bar.done)
        assert bar.bar.n == bar.bar.total == one.passes()[0]
    assert names[:2] == ["numbers, prompt: untrained, seed 0", "numbers, prompt: good, trial, 5e-05"]
    assert names[-1] == "numbers, prompt: good, seed 1, 5e-05"
    with ProgressBar([comparison(tmp_path)]) as again:
        assert again.bar.n == again.bar.initial > 0, "what is finished does not count for the time left"
    assert "pass" in capsys.readouterr().err
