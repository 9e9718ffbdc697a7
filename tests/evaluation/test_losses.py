"""Losses as users write them: any kind of number, random ones, ones that never change, and forwards that fail."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.methods.table import Tiny, TinyLoss
from tests.subspaces.helpers import sgd
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import NotBatchable


def engine(**options: Any) -> tuple[ZerothOrder, TinyLoss]:
    torch.manual_seed(0)
    model = Tiny()
    return ZerothOrder(model, **{"subspace": "full", "seed": 0} | options), TinyLoss(model)


# The kind of number.


@pytest.mark.parametrize(
    "convert",
    [
        float,
        lambda t: t.item(),
        lambda t: np.float32(t),
        lambda t: t.numpy(),
        lambda t: t[None],
        lambda t: t[None, None],
    ],
    ids=["float", "item", "numpy number", "numpy array", "(1,)", "(1, 1)"],
)
def test_every_single_number_is_a_loss(convert: Callable[[Tensor], Any]) -> None:
    zo, loss = engine(batched=False)
    with torch.no_grad():
        expected = zo.estimate(loss).projected_gradients
        zo, loss = engine(batched=False)
        actual = zo.estimate(lambda: convert(loss())).projected_gradients
    assert actual == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (torch.zeros(4), r"shape \(4,\)"),
        (torch.zeros(2, 3), r"shape \(2, 3\)"),
        (torch.zeros(0), r"shape \(0,\)"),
        (np.zeros(4), r"shape \(4,\)"),
        (None, "NoneType"),
        ((torch.zeros(()), None), "tuple"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"batched": False}, {"estimator": "forward_gradient"}], ids=str)
def test_anything_else_is_refused_by_its_shape_or_type(value: Any, named: str, options: dict) -> None:
    zo, _ = engine(**options)
    with pytest.raises(ValueError, match=f"the loss .*{named}"):
        zo.estimate(lambda: value)


# Random numbers.

DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: torch.rand(()).item(),
    "numpy": lambda: float(np.random.rand()),
    "numpy's pairs of normals": lambda: float(np.random.randn()),
    "python": random.random,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize(
    "options",
    [{}, {"estimator": "one_sided", "num_directions": 3}, {"subspace": "low_rank", "rule": "conservative"}],
    ids=str,
)
def test_all_probes_of_a_micro_batch_see_the_same_numbers(draw: Callable[[], float], options: dict) -> None:
    zo, loss = engine(**options)
    optimizer = sgd(zo, 1e-3)
    drawn: list[float] = []

    def noisy() -> Tensor:
        drawn.append(draw())
        return loss() + drawn[-1]

    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(3)
    reference = [draw() for _ in range(4)]
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(3)
    for _ in range(2):
        for _ in range(2):
            zo.probe(noisy, 0.5)
        zo.finish_estimate()
        optimizer.step()
    # One number for each of 2 · 2 micro-batches, the ones that one evaluation of each would have drawn.
    assert list(dict.fromkeys(drawn)) == reference
    assert len(drawn) > len(reference)


def test_common_random_numbers_can_be_turned_off() -> None:
    zo, loss = engine(batched=False, common_random_numbers=False)
    drawn: list[float] = []
    zo.estimate(lambda: (drawn.append(torch.rand(()).item()), loss())[1])
    assert len(drawn) == len(set(drawn)) == 2


class NoisyLoss(TinyLoss):
    """Draws a number in every evaluation, and one for each probe in a batch."""

    def __call__(self) -> Tensor:
        return super().__call__() * (1 + 0 * torch.rand(()))

    def batched(self, copies: int) -> Tensor:
        return super().batched(copies) * (1 + 0 * torch.rand(copies))


def test_a_loss_that_draws_random_numbers_is_not_batched() -> None:
    zo, _ = engine()
    state = torch.get_rng_state()
    NoisyLoss(zo.model)()
    once = torch.get_rng_state()
    torch.set_rng_state(state)
    zo.estimate(NoisyLoss(zo.model))
    assert zo.evaluator.batched is False
    assert torch.equal(torch.get_rng_state(), once)
    zo, _ = engine(batched=True)
    with pytest.raises(NotBatchable, match="draws random numbers"):
        zo.estimate(NoisyLoss(zo.model))


# Failing forwards.


class FailsTogether(TinyLoss):
    """Raises in the forward for all probes, from a given call on."""

    def __init__(self, model: nn.Module, error: Exception, calls: int) -> None:
        super().__init__(model)
        self.error, self.calls = error, calls

    def batched(self, copies: int) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return super().batched(copies)


ERRORS = [
    IndexError("8"),
    KeyError("k"),
    TypeError("t"),
    AssertionError("a"),
    torch.OutOfMemoryError("memory"),
    ValueError("v"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_exception_in_the_trial_means_one_at_a_time(error: Exception) -> None:
    zo, loss = engine()
    with torch.no_grad():
        expected = engine(batched=False)[0].estimate(loss)
    estimate = zo.estimate(FailsTogether(zo.model, error, 0))
    assert zo.evaluator.batched is False
    assert estimate.is_finite and len(expected.projected_gradients) == len(estimate.projected_gradients)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("batched", ["auto", True])
def test_a_later_failure_is_repeated_one_at_a_time_and_told_once(
    error: Exception, batched: str | bool, caplog: pytest.LogCaptureFixture
) -> None:
    zo, _ = engine(batched=batched)
    sequential, loss = engine(batched=False)
    failing = FailsTogether(zo.model, error, 1)
    zo.estimate(failing)
    before = {name: p.clone() for name, p in zo.model.named_parameters()}
    with caplog.at_level(logging.WARNING, logger="zo_hf"):
        found = [zo.estimate(failing) for _ in range(2)]
    assert zo.evaluator.batched is True
    assert [e.projected_gradients for e in found] == [sequential.estimate(loss).projected_gradients] * 2  # to the bit
    assert all(torch.equal(p, before[name]) for name, p in zo.model.named_parameters())
    assert len([r for r in caplog.records if type(error).__name__ in r.message]) == 1
    assert zo.forward_passes == (4 if batched == "auto" else 2) + 4


# Losses without information.


def test_a_loss_that_never_changes_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    zo, loss = engine(batched=False)
    optimizer = sgd(zo, 0.0)

    def warnings_of(steps: int, flat: Callable[[int], bool]) -> list[str]:
        caplog.clear()
        for step in range(steps):
            zo.estimate((lambda: 0 * loss()) if flat(step) else loss)
            optimizer.step()
        return [record.message for record in caplog.records if record.levelno >= logging.WARNING]

    assert warnings_of(19, lambda step: True) == []
    (message,) = warnings_of(24, lambda step: True)
    assert "zo_eps=0.001" in message and "detached" in message
    assert warnings_of(25, lambda step: step % 19 > 0) == []
