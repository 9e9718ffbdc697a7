"""The recipe about trace and generalization: its stacked networks, its step, its Hessian, and runs of few steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from zo_hf.estimators import ESTIMATORS
from zo_hf.stability import critical_step_size


def module_of(weights: Tensor, activation: str) -> nn.Module:
    """The network of a row of weights, of torch's modules, float64."""
    model = nn.Sequential(
        nn.Linear(64, 16), nn.GELU() if activation == "gelu" else nn.Tanh(), nn.Linear(16, 10)
    ).double()
    first, bias, second, other = weights.double().split([1024, 16, 160, 10])
    tensors = (first.view(64, 16).T, bias, second.view(16, 10).T, other)
    with torch.no_grad():
        for parameter, tensor in zip(model.parameters(), tensors, strict=True):
            parameter.copy_(tensor)
    return model


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (model(inputs.double()) - targets.double()).square().sum(-1).mean()


@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_loss_and_spectrum_are_those_of_the_network(recipe: ModuleType, activation: str) -> None:
    weights = torch.stack([recipe.initial_weights(seed) for seed in (0, 1)])
    inputs, targets, *_ = recipe.pictures(0, 7)
    found = recipe.squared_losses(weights, inputs.expand(2, 7, 64), targets.expand(2, 7, 10), activation)
    models = [module_of(row, activation) for row in weights]
    expected = torch.stack([loss_of(model, inputs, targets) for model in models])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    values = recipe.spectrum(weights[0], inputs, targets, activation)
    # The Hessian by backward over backward, in the order of the modules' parameters.
    parameters = list(models[0].parameters())
    slopes = parameters_to_vector(torch.autograd.grad(expected[0], parameters, create_graph=True))
    units = torch.eye(len(slopes), dtype=slopes.dtype)
    parts = torch.autograd.grad(slopes, parameters, units, is_grads_batched=True)
    hessian = torch.cat([part.flatten(1) for part in parts], dim=1)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(hessian), rtol=1e-3, atol=1e-4)


def test_a_step_is_that_of_two_point_descent(recipe: ModuleType) -> None:
    """The package's estimator along the directions that the generators of the seeds draw, for every run."""
    args = recipe.arguments(["--seeds", "3", "4", "--margins", "4", "1", "--examples", "5"])
    runs = recipe.Runs("tanh", args)
    before = runs.weights.clone()
    runs.step()
    estimator = ESTIMATORS["two_point"](eps=args.eps, num_directions=1)
    for index in range(4):
        seed, margin = (3, 4)[index // 2], (4.0, 1.0)[index % 2]
        inputs, targets, *_ = recipe.pictures(seed, 5)
        z = torch.randn(1210, generator=torch.Generator().manual_seed(seed + 1))
        losses = [
            loss_of(module_of(before[index] + probe.scale * z, "tanh"), inputs, targets).item()
            for probe in estimator.probes()
        ]
        (c,) = estimator.projected_gradients(losses)
        rate = critical_step_size(recipe.spectrum(before[index], inputs, targets, "tanh"), negative="ignore") / margin
        expected = before[index] - rate * c * z
        # The recipe's losses are float32, which c divides by 2ε.
        torch.testing.assert_close(runs.weights[index], expected, rtol=0, atol=1e-3 * rate * (abs(c) + 1) + 1e-6)
    assert (runs.weights - before).norm(dim=1).min() > 1e-3


def test_the_others_of_all_pictures_are_the_test(recipe: ModuleType) -> None:
    known, _, others, classes = recipe.pictures(0, recipe.PICTURES - 1)
    assert len(known) == 1796 and len(others) == len(classes) == 1


def test_runs_end_at_equal_loss_and_are_drawn(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recipe", "--activations", "tanh", "--margins", "0.001", "4", "2", "--levels", "0.5", "0.8"]
    words += ["--examples", "10", "--steps", "400", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(tmp_path)])
    recipe.main()
    table = capsys.readouterr().out
    points = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert sum(point.get("end") == "diverged" for point in points) == 2, "a thousand times the critical step size"
    reached = [point for point in points if "level" in point]
    assert len(reached) == 8 and all(0.3 * point["level"] < point["loss"] < point["level"] for point in reached)
    assert all(point["step"] % 20 == 0 and point["distance"] > 0.1 for point in reached)
    by_margin = {
        margin: sum(p["step"] for p in reached if p["margin"] == margin and p["level"] == 0.5) for margin in (2, 4)
    }
    assert by_margin[4] > by_margin[2], "shorter steps take more of them"
    assert table.count("| tanh | 0.8 | ") == 3 + 1 and "tanh 1 0.001: 20" in table
    first = (tmp_path / "trace-and-generalization.png").stat().st_size
    monkeypatch.setattr(
        sys, "argv", [*words, "--output", str(tmp_path), "--plot-only", "--figures", str(tmp_path / "f")]
    )
    recipe.main()
    assert capsys.readouterr().out == table
    assert (tmp_path / "f" / "trace-and-generalization.png").stat().st_size == first


@pytest.mark.parametrize("damage", ['{"activation": "ge', "[1]\n", '{"activation": "gelu"}\n', "\x00"])
def test_a_damaged_file_of_runs_is_refused_in_one_sentence(
    recipe: ModuleType, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs.jsonl").write_text(damage)
    monkeypatch.setattr(sys, "argv", ["recipe", "--plot-only", "--output", str(tmp_path)])
    with pytest.raises(
        ValueError, match=r"runs\.jsonl holds lines that no comparison writes; move it away to start anew\."
    ):
        recipe.main()


def test_runs_of_an_earlier_version_are_refused_in_one_sentence(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = {"activation": "gelu", "seed": 0, "margin": 8.0, "step_size": 0.1, "step": 20}
    measured = {"level": 0.2, "loss": 0.19, "trace": 1.0, "largest": 0.1, "critical": 1.0, "test_loss": 0.3}
    points = [point | {"end": "diverged"}, point | measured | {"test_accuracy": 0.5}]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in points))
    monkeypatch.setattr(sys, "argv", ["recipe", "--plot-only", "--output", str(tmp_path)])
    with pytest.raises(
        ValueError,
        match=r"runs\.jsonl holds runs of an earlier version without 'distance'; make .* without --plot-only\.$",
    ):
        recipe.main()
