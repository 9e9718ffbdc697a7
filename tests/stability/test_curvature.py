"""Trace and largest eigenvalue from forward passes, against the Hessian by autograd."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.conftest import assert_same_bits, weights_of
from tests.stability.bowls import Bowl, Net, engine, hessian
from zo_hf import ZerothOrder
from zo_hf.stability.curvature import group_traces, hessian_trace
from zo_hf.stability.eigenvalue import lambda_max, lanczos
from zo_hf.stability.measured import Measured, student_quantile

SPACES = pytest.mark.parametrize("subspace", ["low_rank", "full"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@SPACES
@DTYPES
def test_the_trace_is_autograds_within_its_error(subspace: str, dtype: torch.dtype) -> None:
    model = Net(dtype)
    zo = ZerothOrder(model, subspace, seed=1)
    expected, before = hessian(model, zo), weights_of(model)
    found = hessian_trace(zo, model, 100, eps=1e-2)
    assert zo.forward_passes == 201 and found.count == 100
    low, high = found.interval(0.999)
    assert low < float(expected.trace()) < high
    spread = float(expected.square().sum() * 2 / 100) ** 0.5
    assert found.standard_error == pytest.approx(spread, rel=0.35)
    assert_same_bits(weights_of(model), before)


@SPACES
def test_group_traces_are_those_of_the_blocks(subspace: str) -> None:
    model = Net()
    zo = ZerothOrder(model, subspace, seed=1)
    expected = hessian(model, zo).diagonal().split([c.numel() for c in zo.subspace.coordinates.values()])
    blocks = dict.fromkeys("ab", 0.0)
    for name, part in zip(zo.subspace.coordinates, expected, strict=True):
        blocks[name[0]] += float(part.sum())
    found = group_traces(zo, model, count=60, eps=1e-2)
    assert list(found) == ["a", "b"]
    for layer, trace in found.items():
        low, high = trace.interval(0.999)
        assert low < blocks[layer] < high
    alone = hessian_trace(zo, model, 60, 1e-2, names=["b.bias"])
    low, high = alone.interval(0.999)
    assert low < float(expected[list(zo.subspace.coordinates).index("b.bias")].sum()) < high
    with pytest.raises(ValueError, match=r"names=\['c'\]"):
        hessian_trace(zo, model, names=["c"])


@pytest.mark.parametrize("eigenvalues", [1.0, [1 / i for i in range(1, 41)]], ids=["flat", "decaying"])
def test_intervals_cover_as_often_as_they_say(eigenvalues: float | list[float]) -> None:
    model = Bowl(eigenvalues, 40)
    zo = engine(model)
    covered = 0
    for seed in range(200):
        zo.seed = seed
        low, high = hessian_trace(zo, model.loss, 8).interval()
        covered += low < float(model.eigenvalues.sum()) < high
    assert 180 <= covered <= 198


def test_students_quantile() -> None:
    for degrees, expected in ((4, 2.7764), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)):
        assert student_quantile(0.975, degrees) == pytest.approx(expected, rel=1e-2 if degrees < 5 else 2e-3)
    assert Measured.of([1.0]).interval() == (-float("inf"), float("inf"))


@SPACES
@DTYPES
@pytest.mark.parametrize("autograd", [False, True])
def test_lambda_max_is_autograds_within_its_error(subspace: str, dtype: torch.dtype, autograd: bool) -> None:
    model = Net(dtype)
    zo = ZerothOrder(model, subspace, seed=1)
    expected, before = float(torch.linalg.eigvalsh(hessian(model, zo))[-1]), weights_of(model)
    found = lambda_max(zo, model, autograd=autograd)
    assert abs(found.value - expected) <= found.error + (1e-6 if dtype == torch.float32 else 0.0)
    assert found.error < 3e-3 * expected
    assert zo.forward_passes == (0 if autograd else 4 * zo.subspace.dimension * found.products)
    assert_same_bits(weights_of(model), before)
    assert all(p.grad is None for p in model.parameters())
    blocks = [] if zo.subspace.coordinate_blocks is None else zo.subspace.coordinate_blocks
    assert not any(block.point is not None and block.point.requires_grad for block in blocks)
    zo.estimate(model)  # the engine goes on as before


def test_the_model_moves_in_the_engine_between_measurements() -> None:
    """What is measured is at the current point of coordinates that are apart from the weights."""
    model = Net()
    zo = engine(model, eps=1e-4)
    with torch.no_grad():
        for coordinate in zo.subspace.coordinates.values():
            coordinate.add_(0.3)
    zo.subspace.coordinates_changed()
    found = lambda_max(zo, model, autograd=True)
    again = lambda_max(zo, model)
    assert found.value == pytest.approx(again.value, rel=1e-5)
    moved = ZerothOrder(zo.finish(), "low_rank", seed=5)
    assert lambda_max(moved, model, autograd=True).value != pytest.approx(found.value, rel=1e-2)


def test_lanczos_states_how_far_off_it_is() -> None:
    """After a few iterations an eigenvalue is within the residual, and after all of them it is the largest."""
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    matrix = root + root.t()
    values = torch.linalg.eigvalsh(matrix)
    for iterations in (2, 4, 8, 30):
        found = lanczos(matrix.mv, 30, iterations, 0.0)
        assert float((values - found.value).abs().min()) <= found.error * (1 + 1e-9) + 1e-12
        assert found.products == iterations + 1
    assert found.value == pytest.approx(float(values[-1]), rel=1e-9)
    assert lanczos(torch.zeros_like, 3, 3).value == 0.0


def test_what_it_would_cost_is_said_before() -> None:
    zo = engine(Bowl(1.0, 100))
    with pytest.raises(ValueError, match=r"8,400 forward passes for 100 coordinates.*autograd=True"):
        lambda_max(zo, zo.model.loss, max_forward_passes=8000)
    assert zo.forward_passes == 0


@pytest.mark.parametrize("eps", [1e-4, 1e-2])
def test_it_says_when_rounding_dominates(eps: float, caplog: pytest.LogCaptureFixture) -> None:
    model = Net(torch.float32)
    zo = ZerothOrder(model, "low_rank", seed=1)
    with caplog.at_level(logging.WARNING):
        found = hessian_trace(zo, model, 20, eps)
    assert ("mostly rounding error" in caplog.text) == (eps == 1e-4)
    truth = float(hessian(model, zo).trace())
    low, high = found.interval(0.999)
    assert low < truth < high, "the error includes the rounding"
