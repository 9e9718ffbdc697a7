"""Two real stages wait at least as long as the formula says, and those of GPipe longer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.parallel.launch import ROOT, run


@pytest.mark.slow
def test_stages_wait_as_the_formulas_say(tmp_path: Path) -> None:
    script, output = tmp_path / "bubble.py", tmp_path / "bubble.json"
    recipes = ROOT / "recipes"
    script.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(recipes)!r})\n"
        f"runpy.run_path({str(recipes / 'pipeline_bubble.py')!r}, run_name='__main__')\n"
    )
    run(script, 2, "--layer-seconds", 0.3, "--steps", 1, "--micro-batches", 1, 2, "--output", output)
    rows = json.loads(output.read_text())["rows"]
    assert [(row["stages"], row["micro_batches"], row["passes"]) for row in rows] == [(2, 1, 2), (2, 2, 4)]
    for row in rows:
        # All else that a step does only adds to the waiting.
        assert row["formula"] - 0.01 < row["waiting"] < 0.9
        assert row["gpipe_formula"] - 0.01 < row["gpipe_waiting"] < 0.9
        # A stage is busy for P passes one way, and for 3 · M with a backward pass, of which one is twice as long.
        assert row["seconds"] > 0.3 * (row["passes"] + 1) - 0.01
        assert row["gpipe_seconds"] > 0.9 * (row["micro_batches"] + 1) - 0.01
