"""Growth and moments against the whole operator, and against particles that take real two-point steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.stability import reference
from zo_hf.stability import Moments, critical_step_size, moment_growth, next_moments

PROCESSES: list[dict[str, Any]] = [
    {},
    {"momentum": 0.5},
    {"momentum": 0.9},
    {"momentum": 0.9, "ema": True},
    {"num_directions": 2},
    {"num_directions": 2, "momentum": 0.6},
    {"preconditioner": np.array([0.5, 2.0, 8.0]), "momentum": 0.9, "ema": True},
]
EVERY_PROCESS = pytest.mark.parametrize("options", PROCESSES, ids=str)
EVERY_DIRECTION = pytest.mark.parametrize("direction", ["gaussian", "sphere", "rademacher"])
VALUES = np.array([1.5, 1.0, 0.2])


def options_for(dimension: int, options: dict[str, Any]) -> dict[str, Any]:
    scale = options.get("preconditioner")
    return options if scale is None else options | {"preconditioner": scale[:dimension]}


@EVERY_DIRECTION
@EVERY_PROCESS
@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_growth_is_the_radius_of_the_whole_operator(dimension: int, direction: str, options: dict[str, Any]) -> None:
    options, values = options_for(dimension, options) | {"direction": direction}, VALUES[:dimension]
    critical = critical_step_size(values, **options)
    for factor in (0.02, 0.3, 0.97, 1.0, 1.04, 3.0):
        expected = reference.growth(factor * critical, np.diag(values), **options)
        # Where roots of the operator meet they are exact to the root of the rounding error only.
        assert moment_growth(factor * critical, values, **options) == pytest.approx(
            expected, rel=1e-9 if dimension > 1 else 1e-6
        )


@pytest.mark.parametrize("direction", ["gaussian", "sphere"])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_the_basis_does_not_matter_to_isotropic_directions(direction: str, momentum: float) -> None:
    basis, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((3, 3)))
    hessian = basis * VALUES @ basis.T
    for step_size in (0.1, 0.4):
        expected = reference.growth(step_size, hessian, momentum=momentum, direction=direction)
        assert moment_growth(step_size, VALUES, momentum=momentum, direction=direction) == pytest.approx(
            expected, rel=1e-10
        )


def test_the_basis_matters_to_signs() -> None:
    """So their η* is for a diagonal H alone."""
    basis = np.array([[1.0, 1.0], [-1.0, 1.0]]) / 2**0.5
    values = np.array([4.0, 1.0])
    critical = critical_step_size(values, direction="rademacher")
    assert reference.growth(critical, np.diag(values), direction="rademacher") == pytest.approx(1, abs=1e-12)
    assert abs(reference.growth(critical, basis * values @ basis.T, direction="rademacher") - 1) > 0.1


@EVERY_DIRECTION
@EVERY_PROCESS
def test_moments_are_those_of_the_whole_operator(direction: str, options: dict[str, Any]) -> None:
    options = options | {"direction": direction}
    start = np.array([1.0, -2.0, 0.5])
    moments, step_size = Moments.at(start), 0.3
    whole = np.outer(np.r_[start, 0, 0, 0], np.r_[start, 0, 0, 0]).ravel()
    matrix = reference.operator(step_size, np.diag(VALUES), **options)
    for _ in range(4):
        moments = next_moments(moments, step_size, VALUES, **options)
        whole = matrix @ whole
        square = whole.reshape(6, 6)
        assert moments.position == pytest.approx(np.diag(square)[:3], rel=1e-12)
        assert moments.mixed == pytest.approx(np.diag(square[:3, 3:]), rel=1e-11, abs=1e-12)
        assert moments.velocity == pytest.approx(np.diag(square)[3:], rel=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9, "num_directions": 3}, {"direction": "rademacher", "momentum": 0.5}], ids=str
)
@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_moments_grow_as_they_should(options: dict[str, Any], factor: float) -> None:
    values = np.array([1.0, 0.7, 0.5, 0.3])
    step_size = factor * critical_step_size(values, **options)
    moments, before = Moments.at(np.ones(4)), Moments.at(np.ones(4))
    for _ in range(400):
        before, moments = moments, next_moments(moments, step_size, values, **options)
    expected = moment_growth(step_size, values, **options)
    assert moments.position / before.position == pytest.approx(expected, rel=1e-6)
    assert (expected > 1) == (factor > 1)


def drawn(direction: str | None, shape: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """A direction for each particle, (particles, d); Gaussian ones for None."""
    u = generator.standard_normal(shape)
    if direction == "sphere":
        return u * shape[1] ** 0.5 / np.linalg.norm(u, axis=1, keepdims=True)
    return np.sign(u) if direction == "rademacher" else u


PARTICLES: list[tuple[dict[str, Any], float]] = [
    ({}, 1e-3),
    ({"momentum": 0.9, "num_directions": 2}, 1.0),
    ({"direction": "sphere", "momentum": 0.5, "ema": True}, 0.1),
    ({"direction": "rademacher", "num_directions": 3}, 0.01),
    ({"momentum": 0.9, "ema": True, "preconditioner": np.array([0.5, 1.0, 2.0, 4.0, 4.0])}, 1e-2),
]


@pytest.mark.parametrize(("options", "mu"), PARTICLES, ids=str)
def test_particles_agree(options: dict[str, Any], mu: float) -> None:
    """Their mean squares after some steps, by Student's statistic; f is evaluated at x ± μu."""
    count, generator = 40_000, np.random.default_rng(3)
    values = np.array([2.0, 1.0, 0.5, 0.1, 0.0])
    step_size = 0.9 * critical_step_size(values, **options)
    direction, q, beta = options.get("direction"), options.get("num_directions", 1), options.get("momentum", 0.0)
    start = np.array([1.0, 0.5, -1.0, 2.0, 1.0])
    x, m, moments = np.tile(start, (count, 1)), np.zeros((count, 5)), Moments.at(start)

    def loss(at: np.ndarray) -> np.ndarray:
        return 0.5 * at**2 @ values

    for _ in range(5):
        estimate = np.zeros_like(x)
        for _ in range(q):
            u = drawn(direction, x.shape, generator)
            estimate += ((loss(x + mu * u) - loss(x - mu * u)) / (2 * mu))[:, None] * u / q
        m = beta * m + (1 - beta if options.get("ema") else 1.0) * estimate
        x = x - step_size / options.get("preconditioner", 1.0) * m
        moments = next_moments(moments, step_size, values, **options)
        for measured, expected in ((x**2, moments.position), (x * m, moments.mixed), (m**2, moments.velocity)):
            error = measured.std(0) / count**0.5
            assert (np.abs(measured.mean(0) - expected) < 5 * error + 1e-9).all()


GROUPS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.8, "num_directions": 2},
    {"direction": "rademacher", "momentum": 0.5, "ema": True},
    {"direction": "sphere"},
]


@pytest.mark.parametrize("options", GROUPS, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_particles_with_groups_of_rows_agree(options: dict[str, Any], groups: int) -> None:
    """Each group has directions of its own, and a share of the loss that differs from the others in its slope."""
    count, generator, mu = 20_000, np.random.default_rng(4), 0.1
    values, noise = np.array([2.0, 1.0, 0.3]), np.array([0.5, 0.1, 2.0])
    q, beta, direction = options.get("num_directions", 1), options.get("momentum", 0.0), options.get("direction")
    step_size = 0.7 * critical_step_size(values, **options | {"num_directions": q * groups})
    start = np.array([1.0, -1.0, 2.0])
    x, m, moments = np.tile(start, (count, 1)), np.zeros((count, 3)), Moments.at(start)
    for _ in range(4):
        estimate = np.zeros_like(x)
        for _ in range(groups):
            slope = generator.standard_normal(x.shape) * (noise / groups) ** 0.5

            def share(at: np.ndarray, slope: np.ndarray = slope) -> np.ndarray:
                return 0.5 * at**2 @ values / groups + (slope * at).sum(1)

            for _ in range(q):
                u = drawn(direction, x.shape, generator)
                estimate += ((share(x + mu * u) - share(x - mu * u)) / (2 * mu))[:, None] * u / q
        m = beta * m + (1 - beta if options.get("ema") else 1.0) * estimate
        x = x - step_size * m
        moments = next_moments(moments, step_size, values, groups=groups, batch_noise=noise, **options)
        for measured, expected in ((x**2, moments.position), (x * m, moments.mixed), (m**2, moments.velocity)):
            assert (np.abs(measured.mean(0) - expected) < 5 * measured.std(0) / count**0.5 + 1e-9).all()


@pytest.mark.parametrize("direction", ["gaussian", "rademacher"])
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_noise_of_batches_leaves_the_critical_step_size_as_it_is(direction: str, factor: float) -> None:
    """Differences of two runs under the same noise grow as without it: by q·G directions, whose η* divides them."""
    values, groups, q, noise = np.array([1.0, 0.5, 0.2]), 6, 2, np.full(3, 0.3)
    many = {"num_directions": q * groups, "direction": direction}
    step_size = factor * critical_step_size(values, **many)
    growth = moment_growth(step_size, values, **many)
    one, other = Moments.at(np.ones(3)), Moments.at(np.full(3, 2.0))
    before = one
    for _ in range(40):
        before = one, other
        one, other = (
            next_moments(
                each, step_size, values, num_directions=q, direction=direction, groups=groups, batch_noise=noise
            )
            for each in before
        )
    grown = (other.position - one.position) / (before[1].position - before[0].position)
    assert grown == pytest.approx(growth, rel=1e-3)
    assert (growth > 1) == (factor > 1)


def test_edges() -> None:
    with pytest.raises(ValueError, match=r"^groups=0 must be at least 1\.$"):
        next_moments(Moments.at(np.ones(2)), 0.1, [1.0, 2.0], groups=0)
    assert moment_growth(0.0, [1.0, 2.0]) == 1.0
    assert moment_growth(5.0, [0.0, 0.0]) == 1.0
    assert moment_growth(0.3, [1.0, 0.5, 0.0]) == moment_growth(0.3, [1.0, 0.5])
    assert moment_growth(0.3, [1.0, -0.5], negative="ignore") == moment_growth(0.3, [1.0])
    assert moment_growth(1e-12, [1.0, 0.5]) == pytest.approx(1 - 1e-12, abs=1e-15)
    assert moment_growth(2.0, [0.5], direction="sphere") == pytest.approx(0, abs=1e-7)
    assert moment_growth(1e49, [1.0]) == pytest.approx(3e98, rel=1e-6)
    assert moment_growth(1e300, [1e300]) == math.inf
    repeated = np.repeat([1.0, 0.5, 1 / 3], 1000)
    assert moment_growth(1e-3, repeated) == pytest.approx(
        moment_growth(1e-3, repeated + 1e-13 * np.arange(3000)), rel=1e-9
    )
    for step_size in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="step_size="):
            moment_growth(step_size, [1.0])
