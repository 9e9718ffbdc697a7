"""The comparison of methods, on a tiny model and a handful of sentences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from zo_hf.comparison import processes, schedule, subject
from zo_hf.comparison.job import Job
from zo_hf.comparison.run import run
from zo_hf.comparison.schedule import TRIAL_SEED


@pytest.mark.slow
def test_methods_get_the_same_forward_passes_and_an_interrupted_comparison_goes_on(
    recipe: ModuleType, model_folder: str, tmp_path: Path, losses: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job] = []

    def noted(job: Job) -> dict[str, Any]:
        before = len(losses)
        found = run(job)
        jobs.append(job)
        # A backward pass comes with one loss, and counts as two more. A run without one begins with a look at what the
        # loss detaches, which is no part of its steps.
        forwards = len(losses) - before
        by_method = {"zero-shot": 0, "adamw with backward": 3 * forwards}
        assert found["forward_passes"] == by_method.get(job.method, forwards - 1)
        return found

    subject.parts_of_task.cache_clear()
    monkeypatch.setattr(schedule, "run", noted)
    monkeypatch.setattr(processes, "prepare_process", lambda: None)
    output = tmp_path / "out"
    command = f"--model {model_folder} --output {output} --seeds 0 1 --forward-passes 18 --trial-forward-passes 8 --rates 2 --trial-seeds 1"
    command += " --evaluations 3 --batch-size 2 --train-rows 16 --eval-rows 6 --max-words 9 --processes 1 --methods"
    recipe.main([*command.split(), "mezo", "two_point q4"])
    assert len(jobs) == 1 + 2 * (2 + 2) == len(set(jobs))
    recipe.main([*command.split(), "mezo", "two_point q4", "adamw with backward", "--passes-to", "mezo"])
    assert len(jobs) == 1 + 3 * (2 + 2) == len(set(jobs)), "only the new method runs"
    recipe.main([*command.split(), "mezo", "--plot-only"])
    assert len(jobs) == 13

    runs = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 13
    steps = {"mezo": 2, "two_point q4": 8, "adamw with backward": 3}
    for made in runs[1:]:
        assert made["forwards_per_step"] == steps[made["method"]]
        assert made["forward_passes"] == made["budget"] // steps[made["method"]] * steps[made["method"]]
        assert made["scores"][-1]["forward_passes"] == made["forward_passes"]
        assert all(math.isfinite(score["loss"]) for score in made["scores"])
    assert {made["seed"] for made in runs if made["evaluations"] == 0} == {TRIAL_SEED}
    full = next(made for made in runs if made["method"] == "mezo" and made["evaluations"])
    assert [score["forward_passes"] for score in full["scores"]] == [6, 12, 18]
    text = (output / "table.md").read_text()
    assert "| majority |" in text
    assert "| forward passes to the final loss of |" not in text, "only where it is asked for"
    for figure in ("methods-forward-passes.png", "methods-time.png"):
        assert (output / figure).stat().st_size > 10_000


def test_a_method_of_the_command_line_is_added(recipe: ModuleType) -> None:
    args = recipe.arguments(["--model", "m", "--methods", "mezo", "mine", "--add", "mine", "3e-4", "zo_rank=8"])
    assert list(args.methods) == ["mezo", "mine"]
    with pytest.raises(SystemExit):
        recipe.arguments(["--model", "m", "--add", "mine"])
    with pytest.raises(SystemExit):
        recipe.arguments(["--model", "m", "--methods", "mezo", "--passes-to", "core"])
