"""The recipe that learns sentiment from a reward, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from zo_hf.tasks import data

OPTIONS = {"any-word": [], "two-words": ["--two-words"], "any-word-by-loss": ["--loss"]}


@pytest.mark.parametrize("folder", OPTIONS)
def test_it_measures_before_and_after(
    recipe: ModuleType, folder: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(f"a {word} film", label) for word in ("b", "c", "d", "e", "f") for label in (0, 1)]
    table = data.Dataset.from_dict({"text": [t + "." * y for t, y in rows], "label": [y for _, y in rows]})
    monkeypatch.setattr(recipe, "default_model", lambda: model_folder)
    monkeypatch.setattr(
        recipe, "embedded_reviews", lambda *_: data.LabeledSentences("some", table, table.select(range(4)))
    )
    monkeypatch.setattr(recipe, "PROMPTS", 4)
    monkeypatch.setattr(recipe, "EVAL_STEPS", 5)
    monkeypatch.setattr(sys, "argv", ["recipe", "--steps", "10", "--output", str(tmp_path), *OPTIONS[folder]])
    recipe.main()
    results = json.loads((tmp_path / folder / "seed-0/results.json").read_text())
    assert results["majority"] == 0.5
    for when in ("before", "after"):
        generated, of_the_two = results[when]["generated"], results[when]["of_the_two_words"]
        samples = folder == "two-words"  # among the two words
        assert 0 <= of_the_two <= 1 and 0 <= generated <= (1 if samples else of_the_two)
    assert samples == any(entry.get("reward") for entry in results["log"])
    curve = dict(results["curve"])
    assert list(curve) == [0, 5, 10] and (curve[0], curve[10]) == tuple(
        results[when]["generated"] for when in ("before", "after")
    )
    assert (tmp_path / f"{folder.removesuffix('-by-loss')}.png").exists()


def test_two_words_are_not_compared_with_a_loss(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", "--loss", "--two-words"])
    with pytest.raises(SystemExit):
        recipe.main()
    assert "--loss does not work with --two-words" in capsys.readouterr().err


def test_a_reward_is_for_the_right_word_alone(recipe: ModuleType) -> None:
    assert recipe.exact_match([" great", " bad"], [" great", " great"]) == [1.0, 0.0]
