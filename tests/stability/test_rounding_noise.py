"""Layers of an unknown format that round their inputs are noticed, and those that do not are left in peace."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import seeded, tiny_opt
from tests.trainer.runs import trained
from zo_hf.engine import ZerothOrder
from zo_hf.stability.rounding_noise import has_unknown_kernels, rounding_noise, warn_of_rounding


class Coded(nn.Module):
    """A linear layer with its weight as codes in a buffer; it may round its inputs to 8 bits a row."""

    def __init__(self, linear: nn.Linear, rounds: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rounds = linear.in_features, linear.out_features, rounds
        self.register_buffer("scales", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("qweight", (linear.weight.detach() / self.scales).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        if self.rounds:
            steps = x.abs().amax(-1, keepdim=True) / 127
            x = (x / steps).round() * steps
        return x @ (self.qweight * self.scales).t()


def engine(kind: str) -> tuple[ZerothOrder, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)]
    if kind != "plain":
        layers[1:] = [Coded(layer, kind == "rounds") for layer in layers[1:]]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    return ZerothOrder(model, "full", eps=1e-3, seed=0), torch.randn(4, 32)


@pytest.mark.parametrize("kind", ["plain", "exact", "rounds"])
def test_only_rounded_inputs_are_warned_about(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    zo, x = engine(kind)
    before = {name: tensor.clone() for name, tensor in zo.model.state_dict().items()}
    with caplog.at_level(logging.WARNING, logger="zo_hf"):
        caplog.clear()
        warn_of_rounding(zo, lambda: zo.model(x).square().mean())
    assert has_unknown_kernels(zo) == (kind != "plain")
    assert zo.forward_passes == (0 if kind == "plain" else 12)
    assert [("zo_eps=0.001" in r.message) for r in caplog.records] == ([True] if kind == "rounds" else [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in zo.model.state_dict().items())


def test_a_larger_eps_is_the_way_out() -> None:
    noises = {}
    for eps in (1e-4, 1e-1):
        zo, x = engine("rounds")
        zo = ZerothOrder(zo.model, "full", eps=eps, seed=0)
        noises[eps] = rounding_noise(zo, lambda x=x, zo=zo: zo.model(x).square().mean())
    assert noises[1e-1] < 0.3 < noises[1e-4]


def test_the_noise_is_that_of_losses_rounded_to_a_grid() -> None:
    """A rounding to multiples of δ is off by δ/√12, and c by √2/2ε times that."""
    eps, grid, found, generator = 1e-3, 2e-4, [], torch.Generator().manual_seed(0)
    for seed in range(100):
        model = nn.Linear(1, 1, bias=False).double()
        slope = 3 + float(torch.rand(1, generator=generator))
        model.weight.data[:] = torch.rand(1, generator=generator)
        zo = ZerothOrder(model, "full", eps=eps, seed=seed, direction="rademacher")
        noise = rounding_noise(zo, lambda model=model, k=slope: (k * model.weight.sum() / grid).round() * grid)
        found.append((noise * slope) ** 2)
        zo.finish()
    assert sum(found) / len(found) == pytest.approx(2 * grid**2 / 12 / (2 * eps) ** 2, rel=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_in_half_precision_logs_its_noise(tmp_path: Path, dtype: torch.dtype) -> None:
    options = {"max_steps": 2, "logging_steps": 1}
    trainer = trained(tmp_path, seeded(tiny_opt, dtype), **options)
    entries = [entry for entry in trainer.state.log_history if "zo/projected_grad" in entry]
    assert len(entries) == 2
    assert all(("zo/rounding_noise" in entry) == (dtype == torch.bfloat16) for entry in entries)
    assert entries[0]["zo/forward_passes"] == (7 if dtype == torch.float32 else 19)
    if dtype == torch.bfloat16:
        assert 0 < entries[0]["zo/rounding_noise"] < float("inf")


@pytest.mark.parametrize(
    ("limit", "expected"), [(11, [7, 9, 11]), (22, [*range(7, 23, 2)]), (23, [19, 21, 23]), (24, [19, 21, 23])]
)
def test_a_budget_is_not_exceeded_for_it(tmp_path: Path, limit: int, expected: list[int]) -> None:
    """7, 2, 2 without the measurement, and 19, 2, 2 with it; before the first step, 4 more are set aside for it."""
    options = {"max_steps": 100, "logging_steps": 1, "zo_max_forward_passes": limit}
    trainer = trained(tmp_path, seeded(tiny_opt, torch.bfloat16), **options)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["zo/forward_passes"] for entry in entries] == expected
    assert all(("zo/rounding_noise" in entry) == (limit >= 23) for entry in entries)


def test_a_loss_that_is_not_finite_is_no_rounding(caplog: pytest.LogCaptureFixture) -> None:
    zo, x = engine("rounds")
    with caplog.at_level(logging.WARNING, logger="zo_hf"):
        caplog.clear()
        warn_of_rounding(zo, lambda: zo.model(x).square().mean() * float("nan"))
    assert zo.rounding_noise is None and not caplog.records
