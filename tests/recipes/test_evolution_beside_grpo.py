"""The recipe that trains by rewards with and without a backward pass, on a tiny model."""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.recipe_module import recipe_module

pytest.importorskip("trl")


def test_it_tunes_and_measures_both(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_module("evolution_beside_grpo")
    for name, value in {"TOKENS": 2, "ANSWERS": 4, "GENERATIONS": 2}.items():
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(recipe, "RATES", {"evolution": (1e-3, 1e-2), "grpo": (1e-5,)})
    monkeypatch.setattr(recipe, "names_animal", lambda completions, **_: [float(len(set(c))) for c in completions])
    commands: list[list[str]] = []

    def in_this_process(command: list[str], check: bool) -> None:
        commands.append(command)
        monkeypatch.setattr(sys, "argv", command[1:])
        recipe.main()

    monkeypatch.setattr(recipe.subprocess, "run", in_this_process)
    argv = ["recipe", "--model", str(model_folder), "--steps", "2", "--rows", "4", "--seeds", "1"]
    for _ in range(2):  # the second time, nothing runs
        monkeypatch.setattr(sys, "argv", [*argv, "--output", str(tmp_path)])
        recipe.main()
    assert len(commands) == 5 and (tmp_path / "curves.png").exists()
    results: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    for (run,) in results.values():
        assert [step for step, _ in run["curve"]] == [0, 1, 2] and len(run["training_rewards"]) == 2
        assert 4 <= run["tokens"] <= 16 and run["peak_mib"] > 0 and run["seconds_per_step"] > 0
        assert (run["seed"], run["split"]) == (1, "test")
    before = {run["curve"][0][1] for (run,) in results.values()}
    assert len(before) == 1  # the same model, prompts and random numbers


def test_the_reward_is_for_whole_words() -> None:
    recipe = recipe_module("evolution_beside_grpo")
    assert recipe.names_animal(["A Dog!", "two cats", "a catch", ""]) == [1.0, 1.0, 0.0, 0.0]
    assert all(set(a.split()).isdisjoint(b.split()) for a, b in combinations(recipe.SPLITS.values(), 2))


def test_a_model_must_be_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_module("evolution_beside_grpo")
    monkeypatch.setattr(sys, "argv", ["recipe"])
    with pytest.raises(SystemExit):
        recipe.main()
    assert "--model is missing" in capsys.readouterr().err
