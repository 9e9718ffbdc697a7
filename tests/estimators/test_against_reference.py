"""Every estimator against its formula, written a second time as loops over explicit vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.conftest import assert_same_bits, weights_of
from tests.estimators.quadratic import ALONG_NOISE, EVERY_DIRECTION, EVERY_ESTIMATOR, Quadratic, directions, engine
from zo_hf.directions import ELEMENTWISE
from zo_hf.engine import ZerothOrder
from zo_hf.rules import SeededSGD

Loss = Callable[[Tensor], float]
Found = tuple[list[float], float, list[Tensor]]  # c of every direction, the loss to report, where it was evaluated


def two_point(loss: Loss, x: Tensor, z: list[Tensor], eps: float) -> Found:
    at = [point for zi in z for point in (x + eps * zi, x - eps * zi)]
    numbers = [(loss(x + eps * zi) - loss(x - eps * zi)) / 2 / eps for zi in z]
    return numbers, sum(loss(point) for point in at) / len(at), at


def second_difference(loss: Loss, x: Tensor, z: list[Tensor], eps: float) -> Found:
    numbers, _, at = two_point(loss, x, z, eps)
    return numbers, loss(x), [x, *at]


def one_sided(loss: Loss, x: Tensor, z: list[Tensor], eps: float) -> Found:
    return [(loss(x + eps * zi) - loss(x)) / eps for zi in z], loss(x), [x, *(x + eps * zi for zi in z)]


def fzoo(loss: Loss, x: Tensor, z: list[Tensor], eps: float) -> Found:
    slopes, clean, at = one_sided(loss, x, z, eps)
    sigma = torch.tensor([loss(x + eps * zi) for zi in z], dtype=torch.float64).std(correction=1).item()
    return [slope / sigma for slope in slopes], clean, at


def evolution(loss: Loss, x: Tensor, z: list[Tensor], eps: float) -> Found:
    _, mean, at = two_point(loss, x, z, eps)
    losses = torch.tensor([loss(point) for point in at], dtype=torch.float64)
    return _from_scores((losses - losses.mean()) / losses.std(correction=0)), mean, at


def evolution_ranks(loss: Loss, x: Tensor, z: list[Tensor], eps: float) -> Found:
    _, mean, at = two_point(loss, x, z, eps)
    losses = [loss(point) for point in at]
    ranks = torch.tensor([sum(other < one for other in losses) for one in losses], dtype=torch.float64)
    return _from_scores(ranks / (len(losses) - 1) - 0.5), mean, at


def _from_scores(scores: Tensor) -> list[float]:
    """The mean over the population of score times its own ±z, as a number for each z (the mean over z is the engine's)."""
    signs = torch.tensor([1.0, -1.0] * (len(scores) // 2), dtype=torch.float64)
    return [(scores[i : i + 2] * signs[i : i + 2]).mean().item() for i in range(0, len(scores), 2)]


def forward_gradient(loss: Loss, x: Tensor, z: list[Tensor], eps: float) -> Found:
    # Of a quadratic the central difference is the derivative, however far it reaches.
    return [(loss(x + zi) - loss(x - zi)) / 2 for zi in z], loss(x), [x] * len(z)


REFERENCE = {
    "two_point": two_point,
    "second_difference": second_difference,
    "one_sided": one_sided,
    "fzoo": fzoo,
    "evolution": evolution,
    "evolution_ranks": evolution_ranks,
    "forward_gradient": forward_gradient,
}
DIRECTIONS = [(name, q) for name, kind in ALONG_NOISE.items() for q in (1, 2, 5) if q >= kind.least_directions]


def test_every_estimator_has_a_reference() -> None:
    assert REFERENCE.keys() == ALONG_NOISE.keys()


@pytest.mark.parametrize(("estimator", "q"), DIRECTIONS)
@EVERY_DIRECTION
@pytest.mark.parametrize("full", [False, True], ids=["apart", "full"])
def test_a_step_is_the_formulas(estimator: str, q: int, direction: str, full: bool) -> None:
    """The numbers, the loss, every point at which the loss was evaluated, and where one step of descent leads."""
    model = Quadratic()
    seen: list[Tensor] = []
    model.at = lambda x, at=model.at: seen.append(x.detach().clone()) or at(x)  # type: ignore[method-assign]
    x = model.x.detach().clone()
    if full:
        zo = ZerothOrder(
            model,
            "full",
            eps=1e-2,
            num_directions=q,
            estimator=estimator,
            direction=direction,
            seed=5,
            batched_probes=False,
        )
        zo.subspace.seed = 5
        optimizer: torch.optim.Optimizer = SeededSGD(zo.coordinates(), zo.subspace, lr=1e-2)
    else:
        zo = engine(model, estimator, q, eps=1e-2, direction=direction)
        optimizer = torch.optim.SGD(zo.coordinates(), lr=1e-2)
    zo.prepare(optimizer)
    estimate = zo.estimate(model)
    optimizer.step()
    zo.finish()

    plain = Quadratic()
    z = list(directions(q, distribution=ELEMENTWISE[direction]))
    numbers, loss, at = REFERENCE[estimator](lambda point: plain.at(point).item(), x, z, 1e-2)
    assert estimate.projected_gradients == pytest.approx(numbers, rel=1e-8)
    assert estimate.loss == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(torch.stack(seen), torch.stack(at), rtol=1e-12, atol=1e-12)
    for number, zi in zip(numbers, z, strict=True):
        x = x - 1e-2 / q * number * zi
    torch.testing.assert_close(model.x.detach(), x, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("estimator", "q"), DIRECTIONS)
def test_forward_passes_are_counted_exactly(estimator: str, q: int) -> None:
    """One clean loss a step where it is shared, and two passes for one that carries tangents."""
    model, calls = Quadratic(), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return model()

    zo = engine(model, estimator, q)
    for _ in range(3):
        zo.estimate(closure)
    expected = {"one_sided": q + 1, "fzoo": q + 1, "second_difference": 2 * q + 1}.get(estimator, 2 * q)
    assert zo.forward_passes == 3 * expected == 3 * len(zo.estimator.probes())
    assert calls == 3 * (q if estimator == "forward_gradient" else expected)
    assert eval(ALONG_NOISE[estimator].about.forwards.replace("2q", "2 * q")) == expected


@EVERY_ESTIMATOR
def test_a_seed_decides_everything(estimator: str) -> None:
    """The same bits again, whatever the global generator does, which no estimator touches; and others with another."""

    def run(seed: int) -> tuple[dict[str, Tensor], list]:
        model = Quadratic()
        zo = engine(model, estimator, seed=seed)
        optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1e-2, momentum=0.9))
        found = []
        for _ in range(5):
            found.append(zo.estimate(model))
            optimizer.step()
        zo.finish()
        return weights_of(model), found

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = run(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    again = run(1)
    assert_same_bits(first[0], again[0])
    assert first[1] == again[1] and first[1] != run(2)[1]


@EVERY_ESTIMATOR
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, -1])
def test_a_loss_that_is_not_finite_moves_nothing(estimator: str, bad: float, where: int) -> None:
    model = Quadratic()
    zo = engine(model, estimator, 3)
    calls = 3 if estimator == "forward_gradient" else len(zo.estimator.probes())
    factors = [1.0] * calls
    factors[where] = bad
    remaining = iter(factors)
    estimate = zo.estimate(lambda: model() * next(remaining))
    assert not estimate.is_finite and zo.skipped_steps == 1
    assert all(coordinate.grad is None for coordinate in zo.subspace.coordinates.values())


@pytest.mark.parametrize("estimator", ["fzoo", "evolution", "evolution_ranks"])
def test_one_direction_is_refused_where_losses_are_compared(estimator: str) -> None:
    with pytest.raises(ValueError, match=rf"^zo_num_directions=1 .*{estimator}.*at least 2\.$"):
        engine(Quadratic(), estimator, 1)
