"""The recipe that learns the form of an answer from a reward, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


def test_it_measures_before_and_after(
    recipe: ModuleType, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "default_model", lambda: model_folder)
    monkeypatch.setattr(recipe, "PROMPTS", 2)
    monkeypatch.setattr(recipe, "TOKENS", 2)
    monkeypatch.setattr(sys, "argv", ["recipe", "--steps", "5", "--held-out", "4", "--output", str(tmp_path)])
    recipe.main()
    results = json.loads((tmp_path / "seed-0/results.json").read_text())
    assert results["steps"] == 5 and results["log"][0]["step"] == 5
    for when in ("before", "after"):
        assert set(results[when]) == {"form", "parses", "is_right"} and not results[when]["parses"]
    assert results["curve"] == [[0, 0.0], [5, 0.0]] and (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("text", "form", "right"),
    [
        ('\n{\n  "name": "Mia",\n  "age": 7\n}', 1.0, 1.0),
        ('{"age": 7, "name": "Tom"}', 1.0, 0.0),
        ('{"name": "Mia", "age": "7"}', 1.0, 0.0),
        ('{"name": "Mia", "age": 7, "city": "Rome"}', 0.75, 0.0),
        ('{"name": "Mia", "age": 7', 0.75, 0.0),
        ('```\n{"name": "Mia", "age": 7}\n```', 0.5, 0.0),
        ('["name", "age"]', 0.0, 0.0),
        ("Mia is 7.", 0.0, 0.0),
    ],
)
def test_the_reward_is_whole_for_the_right_form_alone(
    recipe: ModuleType, text: str, form: float, right: float
) -> None:
    assert recipe.form([text]) == [form] and recipe.parses([text]) == [float(form == 1)]
    assert recipe.is_right([text], ["Mia"], [7]) == [right]


def test_names_of_the_test_are_new(recipe: ModuleType) -> None:
    assert set(recipe.TRAIN_NAMES.split()).isdisjoint(recipe.HELD_OUT_NAMES.split())
    rows = recipe.prompts(recipe.HELD_OUT_NAMES, 3, 0)
    assert rows[0]["prompt"].startswith(f"{rows[0]['name']} is {rows[0]['age']} years old.")
