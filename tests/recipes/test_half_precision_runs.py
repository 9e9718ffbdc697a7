"""Runs in several dtypes end to end, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest


def test_runs_differ_by_rounding_and_the_second_time_they_are_there(
    recipe: ModuleType,
    model_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = f"--model_name_or_path {model_folder} --max_steps 4 --eval_steps 2 --logging_steps 2 --use_cpu true"
    job += " --per_device_train_batch_size 4 --num_train_examples 20 --num_eval_examples 8 --disable_tqdm true"
    words = ["--dtypes", "float32", "bfloat16", "--output", str(tmp_path / "runs.jsonl"), "--job", job]
    recipe.main(words)
    first = capsys.readouterr().out
    exact, half = (line.split(" | ") for line in first.splitlines()[2:])
    assert exact[0] == "| float32" and float(exact[4]) == float(exact[6]) == 0.0 and exact[2] == ""
    assert half[0] == "| bfloat16" and 0 < recipe.distance([(2, 1.0), (4, 2.0)], [(2, 1.0), (4, 2.5)]) < 0.5
    monkeypatch.setattr(recipe, "trained", lambda *given: pytest.fail("it has been trained before"))
    recipe.main([*words, "--figure", str(tmp_path / "runs.png")])
    assert capsys.readouterr().out == first
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
