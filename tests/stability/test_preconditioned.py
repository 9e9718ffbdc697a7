"""The critical step size of a whole Hessian with a preconditioner in another basis."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.stability import reference
from tests.stability.reference import CASES, SPECTRA
from zo_hf.stability import critical_step_size, critical_step_size_of_hessian, step_size_bounds

PROCESSES: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "ema": True},
    {"momentum": 0.5, "num_directions": 2},
    {"direction": "sphere", "momentum": 0.7},
]


def drawn(seed: int, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """A Hessian and a preconditioner that do not commute."""
    generator = np.random.default_rng(seed)
    root = generator.standard_normal((dimension, dimension))
    return root @ root.T, np.exp(generator.uniform(-2, 2, dimension))


@pytest.mark.parametrize("options", PROCESSES, ids=str)
@pytest.mark.parametrize("dimension", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_whole_operator_has_radius_one(seed: int, dimension: int, options: dict[str, Any]) -> None:
    hessian, scale = drawn(seed, dimension)
    value = critical_step_size_of_hessian(hessian, scale, **options)
    for factor in (0.9, 1.0, 1.1):
        radius = reference.growth(factor * value, hessian, preconditioner=scale, **options)
        if factor == 1.0:
            assert radius == pytest.approx(1, abs=1e-9)
        else:
            assert (radius > 1) == (factor > 1)


def test_the_eigenvalues_alone_say_too_much() -> None:
    """They give a larger step size, and a lower bound that is not one; the upper bound holds."""
    excess, below = [], 0
    for seed in range(200):
        hessian, scale = drawn(seed, 2 + seed % 7)
        values = np.linalg.eigvalsh(hessian * scale**-0.5 * scale[:, None] ** -0.5)
        value = critical_step_size_of_hessian(hessian, scale)
        lower, upper = step_size_bounds(values.sum(), values.max())
        excess.append(critical_step_size(values) / value)
        below += value < lower
        assert value < upper
    assert min(excess) > 1 and max(excess) > 1.5
    assert below > 20


@pytest.mark.parametrize(("name", "options", "expected"), CASES, ids=str)
def test_without_a_preconditioner_it_is_the_table(name: str, options: dict[str, Any], expected: float) -> None:
    if len(SPECTRA[name]) <= 100:
        values = np.array(SPECTRA[name])
        assert critical_step_size_of_hessian(np.diag(values), **options) == pytest.approx(expected, abs=6e-7)


def test_a_diagonal_hessian_commutes() -> None:
    values, scale = np.array([5.0, 2.0, 0.1, 0.0]), np.array([0.1, 3.0, 1e-3, 1.0])
    for options in PROCESSES:
        assert critical_step_size_of_hessian(torch.tensor(np.diag(values)), scale, **options) == pytest.approx(
            critical_step_size(values, preconditioner=scale, **options), rel=1e-12
        )


def test_edges() -> None:
    assert critical_step_size_of_hessian(np.zeros((2, 2))) == math.inf
    assert critical_step_size_of_hessian(np.diag([1.0, -1.0]), negative="ignore") == pytest.approx(2 / 3)
    tiny = critical_step_size_of_hessian(1e-250 * np.diag([4.0, 1.0]))
    assert tiny == pytest.approx(1e250 * critical_step_size([4.0, 1.0]), rel=1e-12)
    for about, call in {
        "has the eigenvalue -1": lambda: critical_step_size_of_hessian(np.diag([1.0, -1.0])),
        "square matrix": lambda: critical_step_size_of_hessian(np.ones((2, 3))),
        "of finite numbers": lambda: critical_step_size_of_hessian([[math.nan]]),
        "2 positive": lambda: critical_step_size_of_hessian(np.eye(2), [1.0]),
        "must be 2 positive": lambda: critical_step_size_of_hessian(np.eye(2), [1.0, 0.0]),
        "rademacher": lambda: critical_step_size_of_hessian(np.eye(2), direction="rademacher"),
        "negative='drop'": lambda: critical_step_size_of_hessian(np.eye(2), negative="drop"),
    }.items():
        with pytest.raises(ValueError, match=about):
            call()
