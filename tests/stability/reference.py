"""The second-moment operator of zeroth-order descent with nothing left out, from directions whose moments are exact."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: η* of the spectra, to six digits, from an independent computation.
COLUMNS = [
    {},
    {"num_directions": 4},
    {"num_directions": 16},
    {"momentum": 0.5},
    {"momentum": 0.9},
    {"momentum": 0.9, "num_directions": 4},
    {"momentum": 0.9, "ema": True},
    {"direction": "sphere"},
    {"direction": "sphere", "num_directions": 4},
]
SPECTRA = {
    "one": [1.0],
    "two": [1.0, 1.0],
    "ten": [1.0] * 10,
    "four_one": [4.0, 1.0],
    "spread": [10.0, 1.0, 0.1],
    "harmonic": [1 / i for i in range(1, 101)],
    "one_over_many": [1.0] + [0.01] * 1000,
    "with_a_zero": [2.0, 1.0, 0.5, 0.25, 0.0],
}
TABLE = {
    "one": [0.666667, 1.333333, 1.777778, 0.428571, 0.097436, 0.361905, 0.974359, 2, 2],
    "two": [0.500000, 1.142857, 1.684211, 0.300000, 0.065517, 0.249180, 0.655172, 1.000000, 1.600000],
    "ten": [0.166667, 0.533333, 1.185185, 0.088235, 0.018095, 0.071362, 0.180952, 0.200000, 0.615385],
    "four_one": [0.160973, 0.330312, 0.443988, 0.101374, 0.022719, 0.085119, 0.227193, 0.321946, 0.442633],
    "spread": [0.065788, 0.132886, 0.177711, 0.041938, 0.009477, 0.035330, 0.094768, 0.109647, 0.166352],
    "harmonic": [0.336923, 1.048915, 1.741025, 0.176748, 0.036038, 0.142606, 0.360376, 0.343661, 1.064133],
    "one_over_many": [0.178024, 0.679113, 1.673849, 0.089704, 0.017995, 0.071859, 0.179952, 0.178380, 0.680387],
    "with_a_zero": [0.287373, 0.639171, 0.884727, 0.171851, 0.037335, 0.142467, 0.373353, 0.402323, 0.755173],
}
CASES = [(name, options, value) for name, row in TABLE.items() for options, value in zip(COLUMNS, row, strict=True)]


def nodes(direction: str, dimension: int) -> tuple[Array, Array]:
    """Vectors (n, d) and weights whose moments up to the fourth are those of the distribution."""
    if direction == "rademacher":
        points = np.array(list(itertools.product((-1.0, 1.0), repeat=dimension)))
        return points, np.full(len(points), 1 / len(points))
    if direction == "gaussian":  # Gauss-Hermite with three points
        points = np.array(list(itertools.product((-(3**0.5), 0.0, 3**0.5), repeat=dimension)))
        return points, np.prod(np.where(points == 0, 2 / 3, 1 / 6), axis=1)
    if dimension == 1:
        points = np.array([[1.0], [-1.0]])
    elif dimension == 2:
        angles = 2 * np.pi * np.arange(7) / 7
        points = 2**0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    else:  # the icosahedron
        golden = (1 + 5**0.5) / 2
        corner = np.array([[0, s, t * golden] for s in (-1, 1) for t in (-1, 1)])
        points = np.concatenate([np.roll(corner, i, axis=1) for i in range(3)])
        points *= (3 / (points**2).sum(1, keepdims=True)) ** 0.5
    return points, np.full(len(points), 1 / len(points))


def operator(
    step_size: float,
    hessian: Array,
    *,
    momentum: float = 0.0,
    ema: bool = False,
    num_directions: int = 1,
    direction: str = "gaussian",
    preconditioner: Array | None = None,
) -> Array:
    """E[M ⊗ M] of the random matrix M that takes (x, m) to the next, (4d², 4d²)."""
    d = len(hessian)
    identity, scale = np.eye(d), np.ones(d) if preconditioner is None else preconditioner
    points, weights = nodes(direction, d)
    total = np.zeros((4 * d * d, 4 * d * d))
    for chosen in itertools.product(range(len(points)), repeat=num_directions):
        mean = sum(np.outer(points[i], points[i]) for i in chosen) / num_directions
        moved = (1 - momentum if ema else 1.0) * mean @ hessian
        velocity = np.hstack([moved, momentum * identity])
        position = np.hstack([identity, 0 * identity]) - (step_size / scale)[:, None] * velocity
        matrix = np.vstack([position, velocity])
        total += np.prod(weights[list(chosen)]) * np.kron(matrix, matrix)
    return total


def growth(step_size: float, hessian: Array, **options) -> float:
    return float(np.abs(np.linalg.eigvals(operator(step_size, hessian, **options))).max())
