"""The recipe that sets the noise scale of forward passes beside autograd's, on a tiny model and drawn gradients."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithPadding

from zo_hf import ZerothOrder
from zo_hf.tasks.label_word_loss import LabelWordLoss
from zo_hf.tasks.prompts import PROMPT_A, LabelWordCollator, label_token_ids


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.1, 10), seed=st.integers(0, 10**6))
def test_it_is_found_in_gradients_drawn_with_a_known_one(recipe: ModuleType, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width, rows = 2000, 400
    mean = torch.ones(width) / width**0.5
    gradients = mean + torch.randn(rows, width, generator=generator) * (scale / width) ** 0.5
    value, error = recipe.noise_scale(gradients)
    assert 0 < error < scale
    assert value == pytest.approx(scale, abs=6 * error)


def test_the_error_is_that_of_leaving_each_row_out(recipe: ModuleType) -> None:
    gradients = torch.randn(7, 30, generator=torch.Generator().manual_seed(0)) + 1
    value, error = recipe.noise_scale(gradients)
    products = (gradients.sum(0).square().sum() - gradients.square().sum()) / 42
    assert value == pytest.approx((gradients.square().sum(1).mean() / products - 1).item(), rel=1e-4)
    without = [recipe.noise_scale(torch.cat([gradients[:row], gradients[row + 1 :]]))[0] for row in range(7)]
    middle = sum(without) / 7
    assert error == pytest.approx(math.sqrt(6 / 7 * sum((one - middle) ** 2 for one in without)), rel=1e-4)


def test_the_predicted_gain_has_the_limits_of_the_formula(recipe: ModuleType) -> None:
    assert recipe.predicted_gain(0.0, 16) == 16
    assert recipe.predicted_gain(1.0, 16) == pytest.approx(17 / 2)
    assert recipe.predicted_gain(1e9, 16) == pytest.approx(1)
    assert recipe.predicted_gain(math.inf, 16) == 1


def test_a_hidden_gradient_has_an_infinite_scale(recipe: ModuleType) -> None:
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert recipe.noise_scale(opposite) == (math.inf, math.inf)
    assert recipe.spread([3.0, math.inf]) == "3 to infinite"
    assert recipe.spread([1.0, 2.0]) == "1.5 ± 0.71"
    assert recipe.spread([1.0, None]) == "-"


def test_the_points_halve_the_steps(recipe: ModuleType) -> None:
    assert recipe.points_of(200, 6) == [0, 12, 25, 50, 100, 200]
    assert recipe.points_of(1, 6) == [0, 1]
    assert recipe.points_of(0, 6) == [0]


def test_it_measures_where_the_run_is_and_goes_on(
    recipe: ModuleType, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes: list[int] = []
    original = ZerothOrder.estimate
    monkeypatch.setattr(ZerothOrder, "estimate", lambda zo, loss: probes.append(1) or original(zo, loss))
    output = tmp_path / "out"
    command = f"--model {model_folder} --output {output} --steps 2 --points 2 --sentences 4 --estimates 2 --every 1"
    command += " --batch-size 4 --learning-rate 1e-3 --seeds"
    recipe.main([*command.split(), "0"])
    assert len(probes) == 2 + 2 * (2 * 2 + 2)
    recipe.main([*command.split(), "0", "1"])
    assert len(probes) == 2 * 14, "a finished run is not made again"
    runs = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    for run in runs:
        start, end = run["curve"]
        assert (start["step"], start["forward_passes"]) == (0, 0)
        assert (end["step"], end["forward_passes"]) == (2, 2 * 2 + 4)
        assert end["loss"] != start["loss"], "the copy has the weights of the point"
        assert all(math.isfinite(point["autograd"]) and point["gain"] > 0 for point in run["curve"])
    assert runs[0]["curve"][0]["autograd"] != runs[1]["curve"][0]["autograd"]
    assert "| 2 |" in (output / "table.md").read_text()
    assert (output / "noise-scale.png").stat().st_size > 10_000


@pytest.mark.parametrize("loss", ["vocabulary", "label_words", "head"])
def test_the_mean_of_the_rows_is_the_loss_that_a_comparison_trains_on(
    recipe: ModuleType, model_folder: str, encoder_folder: str, loss: str
) -> None:
    task = recipe.Task(encoder_folder if loss == "head" else model_folder, loss, "low_rank", 0)
    model, rows = task.model(), task.draw(5)
    examples = [task.examples[row] for row in rows]
    collator = LabelWordCollator(task.tokenizer, model) if loss != "head" else DataCollatorWithPadding(task.tokenizer)
    batch = collator(examples)
    outputs = model(**batch)
    expected = outputs.loss
    if loss == "label_words":
        expected = LabelWordLoss(label_token_ids(task.tokenizer, PROMPT_A))(outputs, batch["labels"])
    found = task.loss(model, rows)()
    assert found.shape == (5,)
    assert found.mean_loss().item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_adapter_begins_as_its_model_and_moves_b(recipe: ModuleType, model_folder: str) -> None:
    tasks = {name: recipe.Task(model_folder, "vocabulary", name, 0) for name in ("low_rank", "adapter")}
    models = {name: task.model() for name, task in tasks.items()}
    rows = tasks["adapter"].draw(4)
    plain, adapted = (tasks[name].loss(model, rows)() for name, model in models.items())
    assert adapted.tolist() == pytest.approx(plain.tolist())
    zo, _ = recipe.engine(models["adapter"], "adapter", 0, 1, 0, 1e-3)
    assert zo.subspace.coordinates and all(".lora_B." in name for name in zo.subspace.coordinates)
    measured = recipe.from_autograd(tasks["adapter"], zo, 4)
    assert measured["autograd"] > 0, "the gradient of B is not zero where B is"
    zo.finish()
