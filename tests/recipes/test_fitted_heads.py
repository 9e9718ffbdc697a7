"""Fitted heads on tasks of the suite, end to end, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recipes.recipe_module import recipe_module

SIZES = ["--train-rows", "60", "--eval-rows", "20"]


def test_heads_are_fitted_in_three_ways_and_the_second_time_they_are_there(
    model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_module("fitted_heads")
    words = ["--model", model_folder, "--tasks", "sentiment", "--demo-seeds", "1", "--output", str(tmp_path), *SIZES]
    recipe.main(words)
    first = capsys.readouterr().out
    heading, _, sentiment, demo = first.splitlines()[:4]
    assert heading.endswith(
        "| majority | label words, untrained | fitted head, bare text | fitted head, in the prompt |"
    )
    assert sentiment.startswith("| sentiment | ") and demo.startswith("| demo, seed 1 | ")
    runs = {
        (run["problem"], run["way"]): run
        for run in map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    }
    assert [run["way"] for run in runs.values() if run["passes"] == 0] == ["words", "words"]
    assert all(0 <= run["accuracy"] <= 1 and 0.5 <= run["majority"] <= 1 for run in runs.values())
    monkeypatch.setattr(recipe, "measure", lambda settings: pytest.fail("it has been measured before"))
    recipe.main(words)
    assert capsys.readouterr().out == first


def test_an_encoder_has_no_prompt(encoder_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe_module("fitted_heads").main(
        ["--model", encoder_folder, "--tasks", "numbers", "--output", str(tmp_path / "out"), *SIZES]
    )
    assert capsys.readouterr().out.splitlines()[0] == "| encoder | majority | fitted head, bare text |"
