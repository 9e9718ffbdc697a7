"""The recipe of small networks at the edge of stability: its derivatives, its preconditioner, and runs of few steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from tests.recipes.recipe_module import recipe_module
from zo_hf import ZerothOrder
from zo_hf.stability import critical_step_size_of_hessian
from zo_hf.subspaces import FullInMemory

SHORT = ["recipe", "--networks", "lstm", "--methods", "gd", "adam", "--steps", "6", "--margins", "2"]
SHORT += ["--raises", "3", "--other-eps", "0.1"]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = recipe_module("edge_of_stability")
    monkeypatch.setattr(module, "EXAMPLES", 6)
    monkeypatch.setattr(module, "POINTS", 1)
    lstm = module.Network(lambda: nn.Sequential(module.LSTM(3), nn.Linear(3, 5)), module.sorting, (2.0, 3.0))
    monkeypatch.setitem(module.NETWORKS, "lstm", lstm)
    return module


def small_loss(recipe: ModuleType):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        return recipe.SquaredLoss(model, torch.randn(5, 3).double(), torch.randn(5, 2).double())


@pytest.mark.parametrize("network", ["cnn", "vit", "lstm", "plain-cnn"])
def test_probes_in_one_batch_see_the_same_network(recipe: ModuleType, network: str) -> None:
    torch.manual_seed(0)
    found = recipe.NETWORKS[network]
    loss = recipe.SquaredLoss(found.make(), *found.data())
    estimates = []
    for batched in (True, False):
        zo = ZerothOrder(
            loss.model, FullInMemory(loss.model, seed=1), num_directions=2, seed=1, batched_probes=batched
        )
        estimates.append(zo.estimate(loss).projected_gradients)
        zo.finish()
    assert estimates[0] == pytest.approx(estimates[1], rel=0.02)
    assert max(map(abs, estimates[0])) > 0.05


def test_the_hessian_is_that_of_the_loss(recipe: ModuleType) -> None:
    loss = small_loss(recipe)
    parameters = list(loss.model.parameters())
    value, gradient, matrix = recipe.hessian(loss)
    slopes = parameters_to_vector(torch.autograd.grad(loss(), parameters, create_graph=True))
    rows = [
        parameters_to_vector(torch.autograd.grad(slope, parameters, retain_graph=True, materialize_grads=True))
        for slope in slopes
    ]
    assert value == pytest.approx(loss().item())
    torch.testing.assert_close(gradient, slopes.detach())
    torch.testing.assert_close(matrix, torch.stack(rows))


def test_the_preconditioner_is_what_a_step_was_divided_by(recipe: ModuleType) -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=0.1, betas=(0.9, 0.99), eps=1e-3)
    for step in range(1, 5):
        before = parameter.detach().clone()
        parameter.grad = torch.tensor([0.1 * step, 3.0, 0.0], dtype=torch.float64)
        optimizer.step()
        scale = recipe.preconditioner(optimizer, step)
        assert scale is not None
        momentum = optimizer.state[parameter]["exp_avg"]
        torch.testing.assert_close(before - parameter.detach(), 0.1 * momentum / scale)
    assert recipe.preconditioner(torch.optim.SGD([parameter]), 1) is None


def test_what_is_measured_is_of_the_preconditioned_hessian(recipe: ModuleType) -> None:
    loss = small_loss(recipe)
    optimizer = torch.optim.Adam(loss.model.parameters(), lr=0.01, betas=(0.9, 0.999))
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    found = recipe.measure(loss, optimizer, "adam", 3)
    matrix, scale = recipe.hessian(loss)[2], recipe.preconditioner(optimizer, 3)
    values: Tensor = torch.linalg.eigvals(matrix / scale[:, None]).real
    assert found["trace"] == pytest.approx(float(values.sum()), rel=1e-9)
    assert found["largest"] == pytest.approx(float(values.max()), rel=1e-9)
    critical = critical_step_size_of_hessian(matrix, scale, momentum=0.9, ema=True, negative="ignore")
    assert found["critical"] == pytest.approx(critical) and found["step_size"] == 0.01


def test_runs_are_made_once_and_drawn(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(sys, "argv", [*SHORT, "--output", str(tmp_path)])
    recipe.main()
    table = capsys.readouterr().out
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    assert [(run["method"], run["raised"], run["eps"]) for run in runs] == [
        ("gd", 1.0, 1e-3),
        ("adam", 1.0, 1e-3),
        ("gd", 3.0, 1e-3),
        ("gd", 1.0, 0.1),
    ]
    assert all(len(run["losses"]) == 6 and run["curve"][-1]["step"] == 6 for run in runs)
    plain, raised = runs[0], runs[2]
    assert raised["losses"][:4] == plain["losses"][:4] and raised["losses"][4:] != plain["losses"][4:]
    assert raised["curve"][-1]["step_size"] == pytest.approx(3 * plain["curve"][-1]["step_size"])
    assert table.count("| lstm | ") == 4

    monkeypatch.setattr(recipe, "train", lambda _: pytest.fail("the runs are there"))
    figures = tmp_path / "figures"
    monkeypatch.setattr(sys, "argv", [*SHORT, "--output", str(tmp_path), "--figures", str(figures)])
    recipe.main()
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == lines
    assert {path.name for path in figures.iterdir()} == {
        f"stability-{name}.png" for name in ("networks", "catapult", "eps")
    }
