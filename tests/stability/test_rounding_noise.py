"""Layers of an unknown format that round their inputs are noticed, and those that do not are left in peace."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from zo_hf.engine import ZerothOrder
from zo_hf.stability.rounding_noise import has_unknown_kernels, slope_noise, warn_of_rounding


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
        noises[eps] = slope_noise(zo, lambda x=x, zo=zo: zo.model(x).square().mean())
    assert noises[1e-1] < 0.3 < noises[1e-4]
