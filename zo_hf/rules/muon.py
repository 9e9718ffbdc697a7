"""The matrix sign of the estimate (ZO-Muon, Lang et al., arXiv 2602.17155), by Newton and Schulz's iteration.

    X ← M/‖M‖,  then five times  X ← a·X + (b·A + c·A²)·X,  A = X·Xᵀ       (a, b, c) = (3.4445, -4.7750, 2.0315)
    step:  √max(m, n) · X

With these coefficients (Jordan 2024) the singular values do not converge to 1: those of M/‖M‖ from 0.005 upwards end
between 0.68 and 1.16, and smaller ones end below. The paper averages N = 4 one-sided queries in a subspace of rank 64.
Vectors take the step given in `spectral.py`; the public code uses a fixed learning rate of 1e-7 for them.
"""

from __future__ import annotations

from torch import Tensor

from zo_hf.method_info import Method
from zo_hf.rules.spectral import Spectral, with_unit_maximum

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(Spectral):
    """A step with equal weight on all singular directions, computed in float32, which every device supports."""

    name = "muon"
    about = Method("ZO-Muon (2602.17155)", memory="0, d with zo_momentum", needs="q ≥ 2, or zo_momentum")

    def orthogonalized(self, name: str, matrix: Tensor) -> Tensor:
        return matrix_sign(matrix) * max(matrix.shape) ** 0.5


def matrix_sign(matrix: Tensor) -> Tensor:
    """Return approximately U·Vᵀ for a matrix U·S·Vᵀ, (m, n), and zeros for zeros; see the module for the precision."""
    a, b, c = COEFFICIENTS
    x = with_unit_maximum(matrix)
    x = x.t() if x.shape[0] > x.shape[1] else x  # A is then the smaller of the two products
    x = x / x.norm().clamp_min(1.0)  # the norm is at least 1, the largest entry, unless all entries are zero
    for _ in range(ITERATIONS):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.t() if matrix.shape[0] > matrix.shape[1] else x
