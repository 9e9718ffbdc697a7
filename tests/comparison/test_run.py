"""Runs of a comparison: the same rows and forward passes for every method, on each kind of problem."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_hf.comparison import run as runs
from zo_hf.comparison import subject
from zo_hf.comparison.job import SETTINGS, Job
from zo_hf.comparison.run import run
from zo_hf.comparison.suite.task import DATA_SEED
from zo_hf.tasks.data import embedded_reviews
from zo_hf.tasks.prompts import PROMPT_A, LabelWordCollator, encode_example, label_token_ids


@pytest.fixture(autouse=True)
def parts_of_this_test() -> None:
    """Forget the reviews of the test before, which had a cache of its own."""
    subject.parts_of_task.cache_clear()


def job(model: str, **options: Any) -> Job:
    values = {"task": "sentiment", "alignment": "prompt", "loss": "label_words"}
    values |= {"method": "one", "options": '{"zo_subspace": "full"}', "learning_rate": 1e-3, "seed": 0, "budget": 8}
    values |= {"evaluations": 2, "batch_size": 2, "train_rows": 16, "eval_rows": 6, "max_words": 9}
    return Job(**{"model": model} | values | options)


def test_a_seed_decides_the_batches_whatever_the_method(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[int]] = []
    original = subject.LabelWordCollator.__call__

    def noted(self: Any, examples: Any) -> Any:
        batches.append([token for row in examples for token in row["input_ids"]])
        return original(self, examples)

    monkeypatch.setattr(subject.LabelWordCollator, "__call__", noted)
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


def test_backward_moves_what_the_others_move(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moving: set[str] = set()

    class Noted(runs.Trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            moving.update(name for name, p in self.model.named_parameters() if p.requires_grad)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(runs, "Trainer", Noted)
    run(job(model_folder, options='{"backward": true, "zo_exclude_modules": ".*(embed|norm|head).*"}'))
    assert len(moving) == 2 * 7 and all("proj" in name for name in moving)


def test_a_step_beyond_the_budget_is_refused(model_folder: str) -> None:
    with pytest.raises(ValueError, match="a step takes 10 forward passes, more than the budget of 8"):
        run(job(model_folder, options='{"zo_num_directions": 5}'))


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
    sentences = embedded_reviews(16, 32, DATA_SEED, range(8, 10)).held_out
    half = sentences.select(range(len(sentences) // 2, len(sentences) // 2 * 2))
    encoded = [encode_example(tokenizer, PROMPT_A, row["text"], label_ids[row["label"]], 40) for row in half]
    with torch.no_grad():
        own = model(**LabelWordCollator(tokenizer, model)(encoded)).loss.item()
    assert found == pytest.approx(own, rel=1e-5)
    assert run(replace(over, budget=0, eval_rows=16, loss="label_words"))["scores"][-1]["loss"] != pytest.approx(own)


@pytest.mark.parametrize("loss", ["label_words", "vocabulary"])
def test_trials_are_scored_on_other_rows_than_full_runs(model_folder: str, loss: str) -> None:
    parts = subject.parts_of_task("sentiment", subject.Sizes(16, 6, 9))
    assert not set(parts.development["text"]) & set(parts.test["text"])
    for evaluations, rows in ((0, parts.development), (1, parts.test)):
        found = run(job(model_folder, evaluations=evaluations, budget=0, loss=loss))
        labels = rows["label"][:]
        assert found["majority_accuracy"] == max(labels.count(0), labels.count(1)) / 6
        share = labels.count(0) / 6
        assert found["constant_loss"] == pytest.approx(-share * math.log(share) - (1 - share) * math.log(1 - share))


@pytest.mark.parametrize(
    "options", [{"zo_subspace": "low_rank"}, {"backward": True}], ids=["zeroth order", "backward"]
)
@pytest.mark.parametrize("task", ["sentiment", "entailment"])
def test_a_bare_text_gets_a_head_that_its_seed_decides(model_folder: str, task: str, options: dict[str, Any]) -> None:
    text = json.dumps(options)
    untrained = [
        run(job(model_folder, alignment="head", task=task, budget=0, evaluations=1, seed=seed))["scores"][0]["loss"]
        for seed in (0, 0, 1)
    ]
    assert untrained[0] == untrained[1] != untrained[2]
    trained = run(job(model_folder, alignment="head", task=task, options=text, learning_rate=0.01, budget=12))
    assert trained["scores"][-1]["loss"] != untrained[0] and trained["forward_passes"] == 12
    assert "calibrated_accuracy" not in trained["scores"][0], "there is no prior of label words"


def test_the_forward_passes_of_a_step_are_those_of_most_steps(model_folder: str) -> None:
    by_rows = json.dumps({"zo_subspace": "low_rank", "zo_rows_per_direction": 1})
    found = run(job(model_folder, options=by_rows, budget=20))
    assert found["forwards_per_step"] == 2
    assert found["forward_passes"] % 2, "the first step looks whether rows come apart"


def test_a_fitted_head_is_the_same_for_every_seed_and_trains_on(model_folder: str) -> None:
    settings = {"alignment": "fitted", "task": "questions", "train_rows": 80, "eval_rows": 40, "batch_size": 8}
    fresh = run(job(model_folder, **settings | {"alignment": "head"}, budget=0, evaluations=1))["scores"][0]
    fitted = [run(job(model_folder, **settings, budget=0, evaluations=1, seed=seed))["scores"][0] for seed in (0, 1)]
    assert fitted[0]["loss"] == fitted[1]["loss"] < fresh["loss"]
    trained = run(job(model_folder, **settings, options='{"zo_subspace": "low_rank"}', learning_rate=1e-4, budget=8))
    assert trained["scores"][-1]["loss"] != fitted[0]["loss"] and trained["forward_passes"] == 8


@pytest.mark.parametrize(("task", "rate"), [("digits-cnn", 0.01), ("digits-transformer", 0.003)])
def test_a_network_learns_digits_from_random_weights(task: str, rate: float) -> None:
    options = '{"backward": true, "optim": "adamw_torch"}'
    settings = {"task": task, "alignment": "scratch", "batch_size": 32, "train_rows": 400, "eval_rows": 100}
    settings |= {"options": options, "learning_rate": rate, "budget": 180, "evaluations": 1}
    found = run(job("", **settings))
    assert found["scores"][-1]["accuracy"] > 2 * found["majority_accuracy"]
    assert run(job("", **settings))["scores"][-1]["loss"] == found["scores"][-1]["loss"]


@pytest.mark.parametrize("task", ["digits-cnn", "digits-transformer"])
def test_every_picture_can_have_a_direction_of_its_own(task: str) -> None:
    # Without embeddings, which transformers' class for pictures reads past their module.
    options = '{"zo_rows_per_direction": 1, "zo_direction": "rademacher", "zo_exclude_modules": ".*embed.*"}'
    settings = {"task": task, "alignment": "scratch", "train_rows": 16, "eval_rows": 6, "budget": 12}
    by_rows = run(job("", **settings, options=options))
    shared = run(job("", **settings, options=options.replace(": 1", ": 0")))
    assert by_rows["scores"][-1]["loss"] != shared["scores"][-1]["loss"]
