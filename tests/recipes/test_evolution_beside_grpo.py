"""The recipe that trains by rewards with and without a backward pass, on a tiny model."""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("trl")


def test_it_tunes_and_measures_both(
    recipe: ModuleType, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TOKENS": 2, "ANSWERS": 4, "GENERATIONS": 2}.items():
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(recipe, "RATES", {"evolution": (1e-3, 1e-2), "grpo": (1e-5,)})
    monkeypatch.setattr(recipe, "form", lambda completions, **_: [float(len(set(c))) for c in completions])
    commands: list[list[str]] = []

    def in_this_process(command: list[str], check: bool) -> None:
        commands.append(command)
        monkeypatch.setattr(sys, "argv", command[1:])
        recipe.main()

    monkeypatch.setattr(recipe.subprocess, "run", in_this_process)
    argv = ["recipe", "--model", str(model_folder), "--steps", "2", "--rows", "4"]
    for _ in range(2):  # the second time, nothing runs
        monkeypatch.setattr(sys, "argv", [*argv, "--seeds", "1", "--output", str(tmp_path)])
        recipe.main()
    assert len(commands) == 5 and (tmp_path / "curves.png").exists()
    results: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    for method, (run,) in results.items():
        steps = 8 if method == "evolution" else 2
        assert [point["step"] for point in run["curve"]] == list(range(steps + 1))
        assert len(run["training_rewards"]) == steps and run["peak_mib"] > 0
        assert 4 * steps <= run["curve"][-1]["tokens"] <= 8 * steps
        seconds = [point["seconds"] for point in run["curve"]]
        assert seconds == sorted(seconds) and (run["seed"], run["split"]) == (1, "test")
    before = {run["curve"][0]["reward"] for (run,) in results.values()}
    assert len(before) == 1  # the same model and prompts


def test_names_of_the_splits_differ(recipe: ModuleType) -> None:
    assert all(set(a).isdisjoint(b) for a, b in combinations(recipe.SPLITS.values(), 2))
