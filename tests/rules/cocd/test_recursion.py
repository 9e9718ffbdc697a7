"""Coordinate differences and their reuse, against the same recursion over a flat vector, and against what is known of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from tests.conftest import assert_same_bits, weights_of
from tests.rules.cocd.helpers import N, Quadratic, cocd, regression, run
from zo_hf.engine import ZerothOrder

ESTIMATORS = pytest.mark.parametrize("estimator", ["coordinate", "coordinate_forward"])


RECURSIONS = [
    ("coordinate", memory, per_step, decay)
    for per_step in (1, 3, N)
    for decay in (0.0, 0.9, 1.0)
    for memory in (None, 9)
    if memory is None or (per_step < N and decay)  # of a step that takes all, or forgets all, nothing is remembered
]
RECURSIONS += [("coordinate", N, 3, 0.9), ("coordinate_forward", 9, 3, 0.9)]
RECURSIONS += [("coordinate_forward", None, per_step, 0.9) for per_step in (1, N)]


@pytest.mark.parametrize(("estimator", "memory", "per_step", "decay"), RECURSIONS)
def test_the_iterates_are_those_of_the_recursion(
    decay: float, per_step: int, memory: int | None, estimator: str
) -> None:
    steps = 3 * -(-N // per_step) + 1
    model, loss = regression()
    expected = cocd(model, loss, steps, per_step, decay, 0.02, 0.01, memory, estimator == "coordinate_forward")
    model, loss = regression()
    options = {"cocd_decay": decay, "cocd_memory": memory}
    _, actual = run(model, loss, steps, per_step, 0.02, **options, estimator=estimator)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    assert (actual[-1] - actual[0]).abs().max() > 1e-3


def test_a_permuted_order_takes_every_coordinate_once_a_cycle_and_the_seed_decides() -> None:
    model, loss = regression()
    zo, actual = run(model, loss, 20, 3, 0.02, coordinate_order="permuted", seed=5)
    order = zo.distribution.order.tolist()
    assert sorted(order) == list(range(N)) != order
    model, loss = regression()
    expected = cocd(model, loss, 20, 3, 0.99, 0.02, 0.01, order=order)
    torch.testing.assert_close(actual[-1], expected[-1], rtol=0, atol=1e-7)
    orders = [run(*regression(), 0, 1, 0.1, coordinate_order="permuted", seed=s)[0].distribution.order for s in (5, 6)]
    assert orders[0].tolist() == order != orders[1].tolist()


@ESTIMATORS
def test_evaluations_are_two_a_coordinate_or_one_and_a_shared_one(estimator: str) -> None:
    calls = 0

    def counted() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return loss()

    model, loss = regression()
    zo, _ = run(model, counted, 5, 4, 0.02, estimator=estimator)
    assert calls == zo.forward_passes == 5 * (8 if estimator == "coordinate" else 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decay_of_zero_is_block_coordinate_descent_bit_for_bit(dtype: torch.dtype) -> None:
    _, forgetting = run(*regression(dtype), 20, 3, 0.05, cocd_decay=0.0)
    _, block = run(*regression(dtype), 20, 3, 0.05, rule="none")
    assert all(torch.equal(a, b) for a, b in zip(forgetting, block, strict=True))
    moved = (block[1] - block[0]).nonzero().flatten().tolist()
    assert set(moved) <= {3, 4, 5} and moved


def test_all_coordinates_in_a_step_are_gradient_descent() -> None:
    model, loss = regression()
    _, actual = run(model, loss, 10, N, 0.05, cocd_decay=1.0, eps=1e-4)
    model, loss = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    torch.testing.assert_close(actual[-1], parameters_to_vector(model.parameters()), rtol=0, atol=1e-7)


def problem(rotated: bool = True) -> Quadratic:
    """Eight curvatures from 1 to 4, along the coordinates or along no coordinate."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    hessian = torch.diag(torch.linspace(1.0, 4.0, 8, dtype=torch.float64))
    start = torch.randn(8, generator=generator, dtype=torch.float64)
    return Quadratic(basis @ hessian @ basis.T if rotated else hessian, start)


def test_on_a_quadratic_the_distance_of_probes_does_not_matter() -> None:
    iterates = []
    for eps in (1e-3, 1.0, 30.0):
        model = problem()
        iterates.append(run(model, model, 20, 3, 0.03, eps=eps)[1][-1])
    torch.testing.assert_close(iterates[0], iterates[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(iterates[2], iterates[1], rtol=1e-9, atol=1e-9)
    model = problem()
    forward = run(model, model, 20, 3, 0.03, eps=1.0, estimator="coordinate_forward")[1][-1]
    assert (forward - iterates[1]).abs().max() > 0.01, "a forward difference is off by the curvature times ε/2"


@pytest.mark.parametrize(
    ("per_step", "decay"),
    [(2, 0.0), (2, 0.9), (2, 1.0), (4, 0.9), (8, 1.0)],  # where a step takes all, the decay has nothing to forget
)
def test_it_converges_just_below_the_bound_and_diverges_just_above(per_step: int, decay: float) -> None:
    """α < 2 / (λmax Σ_{k<K} γᵏ): exact where curvatures lie along the coordinates, and enough where they do not."""
    cycle = 8 // per_step
    bound = 2 / (4.0 * sum(decay**k for k in range(cycle)))
    options = {"cocd_decay": decay, "eps": 0.5}
    for rotated, factor, grows in ((False, 0.95, False), (True, 0.95, False), (False, 1.05, True)):
        model = problem(rotated)
        start = parameters_to_vector(model.parameters()).detach().norm()
        _, iterates = run(model, model, 50 * cycle, per_step, factor * bound, **options)
        distance = max(float(w.norm() / start) for w in iterates[-cycle:])
        assert (distance > 10) if grows else (distance < 0.1), (rotated, factor, distance)


def test_probing_leaves_every_bit() -> None:
    for dtype in (torch.float32, torch.float64):
        model, loss = regression(dtype)
        before = weights_of(model)
        zo, _ = run(model, loss, 0, 5, 0.1, eps=1.0)
        for _ in range(10):
            zo.probe(loss)
        assert_same_bits(weights_of(model), before)
        with pytest.raises(KeyboardInterrupt):
            zo.probe(lambda: _interrupt())
        assert_same_bits(weights_of(model), before)


def _interrupt() -> torch.Tensor:
    raise KeyboardInterrupt


def test_frozen_parameters_and_buffers_do_not_move_and_get_no_probe() -> None:
    model, loss = regression()
    model[0].weight.requires_grad_(False)
    before = weights_of(model)
    zo, _ = run(model, loss, 10, 2, 0.05)
    assert zo.distribution.dimension == N - 9
    after = weights_of(model)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert all(not torch.equal(after[name], before[name]) for name in after if name != "0.weight")


def test_groups_have_rates_of_their_own_and_schedules_have_effect() -> None:
    model, loss = regression()
    zo = ZerothOrder(model, "full", estimator="coordinate", rule="cocd", num_directions=N, eps=1e-3)
    layers = [list(model[0].parameters()), list(model[2].parameters()), list(model[3].parameters())]
    groups = [{"params": p, "lr": lr} for p, lr in zip(layers, (0.1, 0.01, 0.0), strict=True)]
    optimizer = zo.prepare(torch.optim.SGD(groups))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for factor in (1.0, 0.5, 0.25):
        before = [[p.detach().clone() for p in layer] for layer in layers]
        exact = torch.autograd.grad(loss(), list(model.parameters()))
        zo.estimate(loss)
        optimizer.step()
        schedule.step()
        expected = iter(exact)
        for old, new, lr in zip(before, layers, (0.1, 0.01, 0.0), strict=True):
            for a, b in zip(old, new, strict=True):
                torch.testing.assert_close(b - a, -lr * factor * next(expected), rtol=1e-4, atol=1e-8)


def test_a_schedule_gives_the_recursion_with_those_rates() -> None:
    model, loss = regression()
    zo = ZerothOrder(model, "full", estimator="coordinate", rule="cocd", num_directions=3, eps=1e-2)
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=0.04))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
    for _ in range(15):
        zo.estimate(loss)
        optimizer.step()
        schedule.step()
    model_, loss_ = regression()
    expected = cocd(model_, loss_, 15, 3, 0.99, [0.04] * 5 + [0.02] * 5 + [0.01] * 5, 0.01)
    torch.testing.assert_close(parameters_to_vector(model.parameters()), expected[-1], rtol=0, atol=1e-7)


def test_weight_decay_shrinks_matrices_apart_from_the_differences() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    before = weights_of(model)
    zo = ZerothOrder(model, "full", estimator="coordinate", rule="cocd", num_directions=8)
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(weight_decay=0.5), lr=0.1))
    zo.estimate(lambda: (model(torch.ones(1, 3)) * 0.0).sum())
    optimizer.step()
    torch.testing.assert_close(model[0].weight, 0.95 * before["0.weight"])
    assert torch.equal(model[0].bias, before["0.bias"])


def test_clipping_scales_the_step_and_not_what_is_remembered() -> None:
    model, loss = regression()
    zo, _ = run(model, loss, 4, 3, 0.05)
    zo.estimate(loss)
    remembered = zo.rule.state()["differences"]
    zo.subspace.clip_gradient(1e-3)
    assert zo.subspace.gradient_norm() <= 1e-3
    assert torch.equal(zo.rule.state()["differences"], remembered) and remembered.norm() > 1e-3


@pytest.mark.parametrize("memory", [None, 6])
def test_a_step_without_finite_losses_is_skipped_and_its_coordinates_rest(memory: int | None) -> None:
    model, loss = regression()
    zo, _ = run(model, loss, 7, 3, 0.02, cocd_memory=memory)  # turn 21: the fifth coordinate is next
    optimizer = zo._optimizer
    before, remembered = weights_of(model), zo.rule.state()["differences"]
    zo.estimate(lambda: loss() * torch.nan)
    optimizer.step()
    assert_same_bits(weights_of(model), before)
    assert torch.equal(zo.rule.state()["differences"], remembered)
    zo.estimate(loss)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert gradient[4:7].tolist() == [0.0, 0.0, 0.0], "what step 7 would have measured"
    assert bool(gradient[7:10].all()), "what step 8 measured"
    assert int(gradient.count_nonzero()) == (N - 3 if memory is None else 3)
