"""The matrix sign of the estimate (ZO-Muon, Lang et al., arXiv 2602.17155), by Newton and Schulz's iteration.

    X ← M/‖M‖,  then five times  X ← a·X + (b·A + c·A²)·X,  A = X·Xᵀ       (a, b, c) = (3.4445, -4.7750, 2.0315)
    step:  √max(m, n) · X

The coefficients (Jordan 2024) do not converge to 1: singular values of M/‖M‖ from 0.005 upwards end between 0.68 and 1.16,
and smaller ones below. The paper averages N = 4 one-sided queries in a subspace of rank 64. Vectors take the step that
`spectral.py` says, where the public code has a fixed learning rate of 1e-7.
"""

from __future__ import annotations

from torch import Tensor

from zo_hf.method import Method
from zo_hf.optimizers.spectral import Spectral, of_size_one

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(Spectral):
    """All singular directions alike; in float32, which every kind of replica can do, and not in bfloat16."""

    name = "muon"
    about = Method("ZO-Muon (2602.17155)", memory="0, d with zo_momentum", needs="q of 2, or zo_momentum")

    def orthogonalised(self, name: str, matrix: Tensor) -> Tensor:
        return matrix_sign(matrix) * max(matrix.shape) ** 0.5


def matrix_sign(matrix: Tensor) -> Tensor:
    """U·Vᵀ of a matrix U·S·Vᵀ, (m, n), to the precision that the formula above says; of zeros, zeros."""
    a, b, c = COEFFICIENTS
    x = of_size_one(matrix)
    x = x.t() if x.shape[0] > x.shape[1] else x  # A is then the smaller of the two products
    x = x / x.norm().clamp_min(1.0)  # at least 1, the largest entry, unless all are zero
    for _ in range(ITERATIONS):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.t() if matrix.shape[0] > matrix.shape[1] else x
