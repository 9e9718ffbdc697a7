"""The comparison of methods, on a tiny model and a handful of sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from common import method_runs
from common.method_report import Result, share_of_budget, smoothed_mean
from common.method_runs import SETTINGS, Job, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes.recipe_module import recipe_module
from zo_hf.tasks.data import embedded_reviews
from zo_hf.tasks.prompts import PROMPT_A, LabelWordCollator, encode_example, label_token_ids


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return recipe_module("compare_methods")


def job(model: str, **options: Any) -> Job:
    values = {"method": "one", "options": '{"zo_subspace": "full"}', "learning_rate": 1e-3, "seed": 0, "budget": 8}
    values |= {"evaluations": 2, "batch_size": 2, "train_rows": 16, "eval_rows": 6, "max_words": 9}
    return Job(model, **values | options)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each loss that training computed, whoever counts it."""
    computed: list[int] = []
    original = method_runs.LabelWordLoss.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        computed.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(method_runs.LabelWordLoss, "__call__", counted)
    return computed


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

    monkeypatch.setattr(recipe, "run", noted)
    monkeypatch.setattr(recipe, "prepare_process", lambda: None)
    output = tmp_path / "out"
    command = (
        f"--model {model_folder} --output {output} --seeds 0 1 --forward-passes 18 --trial-forward-passes 8 --rates 2"
    )
    command += " --evaluations 3 --batch-size 2 --train-rows 16 --eval-rows 6 --max-words 9 --processes 1 --methods"
    recipe.main([*command.split(), "mezo", "two_point q4"])
    assert len(jobs) == 1 + 2 * (2 + 2) == len(set(jobs))
    recipe.main([*command.split(), "mezo", "two_point q4", "adamw with backward"])
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
    assert {made["seed"] for made in runs if made["evaluations"] == 0} == {recipe.TRIAL_SEED}
    assert [score["forward_passes"] for score in runs[3]["scores"]] == [6, 12, 18]
    assert "| majority |" in (output / "table.md").read_text()
    for figure in ("methods-forward-passes.png", "methods-time.png"):
        assert (output / figure).stat().st_size > 10_000


def test_a_seed_decides_the_batches_whatever_the_method(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[int]] = []
    original = method_runs.LabelWordCollator.__call__

    def noted(self: Any, examples: Any) -> Any:
        batches.append([token for row in examples for token in row["input_ids"]])
        return original(self, examples)

    monkeypatch.setattr(method_runs.LabelWordCollator, "__call__", noted)
    seen = []
    for options, seed in (
        ('{"zo_subspace": "full"}', 0),
        ('{"zo_subspace": "adapter"}', 0),
        ('{"backward": true, "zo_exclude_modules": ".*norm.*"}', 0),
        ('{"zo_subspace": "full"}', 1),
    ):
        batches.clear()
        run(job(model_folder, options=options, seed=seed, budget=12))
        seen.append(batches[:4])
    assert seen[0] == seen[1] == seen[2]
    assert seen[0] != seen[3]


def test_trials_are_scored_on_other_sentences_than_full_runs(
    model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[set[str]] = []
    original: Callable[..., None] = method_runs.Scorer.__init__

    def noted(self: Any, tokenizer: Any, sentences: Any, *args: Any) -> None:
        texts.append(set(sentences["text"]))
        original(self, tokenizer, sentences, *args)

    monkeypatch.setattr(method_runs.Scorer, "__init__", noted)
    for evaluations in (0, 1):
        run(job(model_folder, evaluations=evaluations, budget=0))
    assert len(texts[0]) == len(texts[1]) == 6 and not texts[0] & texts[1]


def test_backward_moves_what_the_others_move(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moving: set[str] = set()

    class Noted(method_runs.Trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            moving.update(name for name, p in self.model.named_parameters() if p.requires_grad)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(method_runs, "Trainer", Noted)
    run(job(model_folder, options='{"backward": true, "zo_exclude_modules": ".*(embed|norm|head).*"}'))
    assert len(moving) == 2 * 7 and all("proj" in name for name in moving)


def test_a_step_beyond_the_budget_is_refused(model_folder: str) -> None:
    with pytest.raises(ValueError, match="a step takes 10 forward passes, more than the budget of 8"):
        run(job(model_folder, options='{"zo_num_directions": 5}'))


def test_the_search_follows_the_best_rate_and_then_closes_in(recipe: ModuleType) -> None:
    def search(best: float, trials: int) -> dict[float, float]:
        losses: dict[float, float] = {}
        for rate in recipe.first_rates(1e-4, 4.0, trials):
            losses[rate] = abs(math.log(rate / best))
        while len(losses) < trials:
            rate = recipe.next_rate(losses, 4.0)
            losses[rate] = abs(math.log(rate / best))
        return losses

    assert sorted(search(1e-4, 5)) == pytest.approx([2.5e-5, 5e-5, 5e-5 * math.sqrt(2), 1e-4, 4e-4])
    far = search(6.4e-3, 5)
    assert max(far) == pytest.approx(6.4e-3) and min(far, key=far.__getitem__) == max(far)
    near = search(2e-4, 4)
    assert near[min(near, key=near.__getitem__)] == pytest.approx(0, abs=1e-6)
    assert recipe.next_rate({0.25: math.nan, 1.0: 0.5, 4.0: 0.6}, 4.0) == 2.0, "what is lost is the worst"


def test_methods_that_do_not_exist_here_are_named_and_left_out(
    recipe: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {
        "new": recipe.Method("a", 1.0, {"zo_estimator": "not yet", "zo_new_option": 3}),
        "old": recipe.Method("a", 1.0, {"zo_estimator": "two_point"}),
    }
    assert list(recipe.choose(None, methods)) == ["old"]
    shown = capsys.readouterr().out
    assert shown == "skipped new: this version of zo_hf has no zo_estimator=not yet, zo_new_option=3\n"
    with pytest.raises(ValueError, match="--methods ol matches none of new, old"):
        recipe.choose(["ol"], methods)


def test_a_method_can_be_added_by_its_options(recipe: ModuleType) -> None:
    args = recipe.arguments(
        ["--model", "m", "--methods", "mezo", "mine", "--add", "mine", "3e-4", "zo_rank=8", "zo_normalize=true"]
    )
    assert args.methods["mine"] == recipe.Method("added", 3e-4, {"zo_rank": 8, "zo_normalize": True})
    with pytest.raises(SystemExit):
        recipe.arguments(["--model", "m", "--add", "mine"])


def test_a_method_that_fails_does_not_stop_the_others(
    recipe: ModuleType, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "prepare_process", lambda: None)
    command = (
        f"--model {model_folder} --output {tmp_path / 'out'} --seeds 0 --forward-passes 4 --trial-forward-passes 2"
    )
    command += " --rates 1 --evaluations 1 --batch-size 2 --train-rows 16 --eval-rows 6 --max-words 9 --processes 1"
    args = recipe.arguments([*command.split(), "--methods", "mezo", "refused", "--add", "refused", "1", "zo_rank=0"])
    comparison = recipe.Comparison(args)
    done: list[str] = []
    comparison.run_all(recipe.InThisProcess(), lambda job: done.append(job.method))
    assert done == ["zero-shot", "mezo", "mezo", "refused"]
    assert "zo_rank=0 must be a whole number of at least 1" in comparison.failed["refused"]
    assert "| mezo | 2 |" in comparison.report()


def result(losses: list[list[float]], passes: list[int]) -> Result:
    runs = [
        {"scores": [{"loss": l, "forward_passes": p} for l, p in zip(seed, passes, strict=True)]} for seed in losses
    ]
    return Result("g", 1.0, False, runs)


def test_the_share_of_the_budget_is_where_the_smoothed_mean_crosses() -> None:
    reference = result([[4.0, 4.0, 2.0, 2.0], [4.0, 4.0, 2.0, 2.0]], [10, 20, 30, 40])
    assert smoothed_mean(reference.over_seeds("loss")).tolist() == pytest.approx([4, 10 / 3, 8 / 3, 2])
    start = {"loss": 5.0}
    quick = result([[3.0, 1.0, 1.0, 1.0], [3.0, 1.0, 1.0, 1.0]], [9, 18, 27, 36])
    # Smoothed 5, 2, 5/3, ...: at 2 after 9 of 40 passes.
    assert share_of_budget(quick, reference, start, "loss") == pytest.approx(9 / 40)
    between = result([[3.0, 3.0, 0.0, 0.0]], [10, 20, 30, 40])
    # Smoothed 3, 2, 1, 0.
    assert share_of_budget(between, reference, start, "loss") == pytest.approx(20 / 40)
    assert share_of_budget(reference, reference, start, "loss") == 1.0
    assert share_of_budget(result([[3.0] * 4], [10, 20, 30, 40]), reference, start, "loss") is None
    assert share_of_budget(quick, reference, {"loss": 1.5}, "loss") is None, "the reference learned nothing"
    assert share_of_budget(quick, result([[math.nan] * 4], [10, 20, 30, 40]), start, "loss") is None


def test_what_identifies_a_run_is_not_overwritten_by_what_came_of_it(model_folder: str) -> None:
    found = run(replace(job(model_folder), budget=0, evaluations=1))
    assert not found.keys() & set(SETTINGS)


def test_the_loss_over_the_vocabulary_is_the_models_own(model_folder: str, losses: list[int]) -> None:
    over = job(model_folder, loss="vocabulary", learning_rate=1e-2, budget=20)
    assert run(over)["forward_passes"] == 20
    assert not losses, "training computed the loss among the label words"

    found = run(replace(over, budget=0, eval_rows=16))["scores"][-1]["loss"]
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    label_ids = label_token_ids(tokenizer, PROMPT_A)
    sentences = embedded_reviews(16, 32, method_runs.DATA_SEED, range(8, 10)).held_out
    half = sentences.select(range(len(sentences) // 2, len(sentences) // 2 * 2))
    encoded = [encode_example(tokenizer, PROMPT_A, row["text"], label_ids[row["label"]], 40) for row in half]
    with torch.no_grad():
        own = model(**LabelWordCollator(tokenizer, model)(encoded)).loss.item()
    assert found == pytest.approx(own, rel=1e-5)
    assert run(replace(over, budget=0, eval_rows=16, loss="label_words"))["scores"][-1]["loss"] != pytest.approx(own)
