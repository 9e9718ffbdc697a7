"""A plain layer at the points of groups: the sum of its product and its correction, and the layers that are not plain."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zo_hf.engine import ZerothOrder
from zo_hf.estimators.estimate import Estimate
from zo_hf.subspaces.moved_linear import moved_linear, plain_weights

GROUPS, ROWS, N, M, RANK = 3, 4, 10, 6, 2


def bound(module: nn.Module) -> Any:
    return functools.partial(type(module).forward, module)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "moves"),
    [*itertools.product(("linear", "conv1d"), ("weight", "bias", "both")), ("no bias", "weight")],
)
def test_the_output_is_that_of_a_layer_for_each_group(kind: str, moves: str) -> None:
    module = Conv1D(M, N) if kind == "conv1d" else nn.Linear(N, M, bias=kind == "linear")
    x, basis, left, shift = (
        random(GROUPS * ROWS, N),
        random(N, RANK, seed=1),
        random(GROUPS, M, RANK),
        random(GROUPS, M),
    )
    plain = plain_weights(module, bound(module), x)
    assert plain is not None
    weight, bias = plain
    expected = []
    for group, part in enumerate(x.chunk(GROUPS)):
        moved = weight + basis @ left[group].t() if moves != "bias" else weight
        offset = 0 if bias is None else bias + shift[group] if moves != "weight" else bias
        expected.append(part @ moved + offset)
    thin, factors = (None, None) if moves == "bias" else (x @ basis, left)
    vector = bias if bias is None or moves == "weight" else bias + shift
    found = moved_linear(x, weight, vector, thin, factors, GROUPS)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


class Other(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Marked(Tensor):
    """A subclass, as fake tensors and those of quantized weights are."""


@torch.no_grad()
def test_a_layer_that_does_anything_else_is_not_plain() -> None:
    layer, x = nn.Linear(N, M), random(2, N)
    assert plain_weights(layer, bound(layer), x) is not None
    assert plain_weights(layer, layer.forward, x) is not None, "accelerate keeps the bound method"
    other, half = Other(N, M), nn.Linear(N, M).bfloat16()
    assert plain_weights(other, bound(other), x) is None
    assert plain_weights(layer, lambda x: layer(x), x) is None
    assert plain_weights(half, bound(half), x) is None
    assert plain_weights(layer, bound(layer), x.bfloat16()) is None
    assert plain_weights(layer, bound(layer), x.as_subclass(Marked)) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert plain_weights(layer, bound(layer), x) is None
    with torch.enable_grad():
        assert plain_weights(layer, bound(layer), x) is None
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(N, M))
    assert plain_weights(normed, bound(normed), x) is None
    assert plain_weights(layer, bound(layer), x[:0]) is None
    seen = []
    torch.func.vmap(lambda row: seen.append(plain_weights(layer, bound(layer), row)) or row)(x)
    assert seen == [None]


class Experts(nn.Module):
    """A layer that some tokens choose, and one that none does."""

    def __init__(self, has_bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.chosen, self.other = nn.Linear(N, M, bias=has_bias), nn.Linear(N, M, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.chosen(x), self.other(x[:0])])


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_a_layer_may_see_no_rows(subspace: str, has_bias: bool) -> None:
    model, x = Experts(has_bias), random(ROWS, N)
    options: dict[str, Any] = {"rank": RANK} if subspace == "low_rank" else {}
    zo = ZerothOrder(model, subspace, batched_probes=False, **options)
    assert zo.estimate(lambda: model(x).square().mean()).is_finite


@pytest.mark.parametrize("moving", [".*", ".*bias"])
def test_torch_func_may_map_a_model(moving: str) -> None:
    def estimated(mapped: bool) -> Estimate:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, 1)), random(ROWS, N)
        zo = ZerothOrder(model, "low_rank", rank=RANK - 1, target_modules=moving, batched_probes=False)
        return zo.estimate(lambda: (torch.func.vmap(model) if mapped else model)(x).square().mean())

    assert estimated(True).loss == pytest.approx(estimated(False).loss, rel=1e-5)
