"""The recipe of a language model at the edge of stability, on a tiny model and a few sentences."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest


def test_it_measures_counts_and_goes_on(recipe: ModuleType, model_folder: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = f"--model {model_folder} --output {output} --steps 12 --sentences 4 --every 3".split()
    recipe.main([*command, "--margins", "2", "--subspaces", "low_rank"])
    recipe.main([*command, "--margins", "2"])
    runs = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    assert [run["subspace"] for run in runs] == ["low_rank", "lora"], "a finished run is not made again"
    for run in runs:
        # Two a step, one more at steps 0, 3, 6 and 9, and what was measured before the first.
        assert run["forward_passes"] == 2 * 12 + 4 + 2 * recipe.DIRECTIONS_BEFORE + 1
        assert [point["step"] for point in run["curve"]] == [0, 3, 6, 9]
        bound = 2 / (run["initial_trace"] + 2 * run["initial_norm"])
        assert run["learning_rate"] == pytest.approx(bound / 2)
    assert "| lora | 2 |" in (output / "table.md").read_text()
    assert (output / "stability-language-model.png").stat().st_size > 10_000
