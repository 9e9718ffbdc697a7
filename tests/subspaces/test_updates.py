"""Guarantee 2, for every subspace: the update moves along exactly the direction that was probed."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import seeded
from tests.subspaces.helpers import EVERY_SUBSPACE, UNQUANTISED, draws_for, sgd, with_scales
from zo_hf.directions import DISTRIBUTIONS
from zo_hf.engine import ZerothOrder
from zo_hf.subspaces import SUBSPACES

LR = 1e-3


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 9)
        self.second = nn.Linear(9, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def seen_weights(model: TwoLayers) -> list[Tensor]:
    """What the layers apply at this moment, by feeding them unit vectors, and zeros for the bias alone."""
    with torch.no_grad():
        return [layer(torch.eye(layer.in_features + 1, dtype=torch.float64)[:, 1:]).t() for layer in model.children()]


@pytest.mark.parametrize(
    ("subspace", "distribution", "directions"),  # scales move by factors
    [
        (name, distribution, directions)
        for name in UNQUANTISED
        for distribution in DISTRIBUTIONS
        for directions in ((1, 3) if distribution == "gaussian" else (3,))
        if draws_for(distribution, name)
    ],
)
def test_the_update_moves_along_what_was_probed(subspace: str, distribution: str, directions: int) -> None:
    """θ' - θ = -η/q · Σ cᵢ · (θ(+ε) - θ(-ε))/2ε on every step, of which two in seven begin with a new V.

    Measured at the layers' outputs alone, without a word about how directions are made.
    """
    model = seeded(TwoLayers, torch.float64)
    kwargs = {"fold_steps": 3, "rank": 2} if subspace in ("low_rank", "core") else {}
    zo = ZerothOrder(
        model, SUBSPACES[subspace](model, seed=2, **kwargs), num_directions=directions, direction=distribution
    )
    optimizer = sgd(zo, lr=LR)
    x = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probed: list[list[Tensor]] = []

    def closure() -> Tensor:
        probed.append(seen_weights(model))
        return model(x).square().sum()

    seen_directions = []
    for _ in range(7):
        probed.clear()
        before = seen_weights(model)
        estimate = zo.estimate(closure)
        assert all(torch.equal(a, b) for a, b in zip(seen_weights(model), before, strict=True))
        optimizer.step()
        moves: list[list[Tensor]] = [[] for _ in range(directions)]
        for layer, (old, new) in enumerate(zip(before, seen_weights(model), strict=True)):
            z = [
                (p[layer] - m[layer]) / (2 * zo.estimator.eps) for p, m in zip(probed[::2], probed[1::2], strict=True)
            ]
            middle = [(p[layer] + m[layer]) / 2 for p, m in zip(probed[::2], probed[1::2], strict=True)]
            assert all(torch.allclose(m, old, atol=1e-12) for m in middle)
            change = sum(c * zi for c, zi in zip(estimate.projected_gradients, z, strict=True)) * -LR / directions
            assert torch.allclose(new - old, change, rtol=1e-8, atol=1e-12)
            for move, zi in zip(moves, z, strict=True):
                move.append(zi.flatten())
        seen_directions.extend(torch.cat(move) for move in moves)
    independent = torch.corrcoef(torch.stack(seen_directions)) - torch.eye(len(seen_directions), dtype=torch.float64)
    assert independent.abs().max() < 0.9  # no direction was used twice


class Called(nn.Module):
    """A linear layer and an embedding, called in one of the ways in which code calls them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embed = nn.Embedding(9, 8)
        self.linear = nn.Linear(8, 6)

    def forward(self, ids: Tensor) -> Tensor:
        if self.way == "keyword":
            *_, name = inspect.signature(type(self.linear).forward).parameters  # bitsandbytes calls it x
            return self.linear(**{name: self.embed(input=ids)})
        if self.way == "one dimension":
            return torch.stack([self.linear(self.embed(i)) for i in ids.flatten()]).view(*ids.shape, 6)
        if self.way == "transposed":
            return self.linear(self.embed(ids.t()).transpose(0, 1))
        if self.way == "four dimensions":
            return self.linear(self.embed(ids[None])[:, :, :])[0]
        return self.linear(self.embed(ids))


@EVERY_SUBSPACE
@pytest.mark.parametrize("way", ["keyword", "one dimension", "transposed", "four dimensions"])
def test_a_probe_does_not_depend_on_how_a_layer_is_called(subspace: str, way: str) -> None:
    ids = torch.randint(0, 9, (3, 4), generator=torch.Generator().manual_seed(0))
    found = []
    for called in ("plainly", way):
        model = with_scales(subspace, seeded(lambda called=called: Called(called), torch.float64))
        zo = ZerothOrder(model, subspace, num_directions=3, eps=0.1)
        found.append(zo.estimate(lambda model=model: model(ids).sin().sum()).projected_gradients)
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    assert min(map(abs, found[0])) > 1e-3
