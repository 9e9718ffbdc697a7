"""The recipe that sets `learning_rate="auto"` beside a grid, on a regression small enough for a test."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.recipes.recipe_module import recipe_module

SHORT = ["recipe", "--problems", "noisy regression", "--forward-passes", "400", "--seeds", "0"]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = recipe_module("find_lr_against_grid")
    whole = module.regression

    def few_rates():
        problem = whole()
        problem.rates = [1e-4, 1e-3]
        return problem

    monkeypatch.setitem(module.SMALL, "noisy regression", few_rates)
    return module


def test_it_compares_at_equal_passes_and_continues(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*SHORT, "--output", str(tmp_path)])
    recipe.main()
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [run["rate"] for run in runs] == ["before", "auto", 1e-4, 1e-3]
    assert {run["taken"] for run in runs[1:]} == {400} and runs[1]["search"] == 20
    assert runs[3]["loss"] < runs[0]["loss"]
    (_, _, row) = (tmp_path / "table.md").read_text().splitlines()
    assert f"{runs[1]['found']:.2g}" in row and row.endswith("| 5.0% |")
    assert (tmp_path / "find_lr.png").stat().st_size > 1000

    monkeypatch.setattr(recipe, "train", lambda *_: pytest.fail("a finished run is made again"))
    recipe.main()
    assert (tmp_path / "table.md").read_text().splitlines()[2] == row


def test_what_is_none_of_the_problems_is_said(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", "--problems", "chess"])
    with pytest.raises(SystemExit):
        recipe.main()
    assert (
        "--problems 'chess' is unknown; choose among 'digits', 'noisy regression', 'convolution'."
        in capsys.readouterr().err
    )
