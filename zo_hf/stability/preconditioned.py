"""The critical step size with a preconditioner that does not commute with the Hessian, as is the case for Adam.

The derivation is ours; arXiv 2604.14669, theorem 3, has η* as a function of the eigenvalues of P⁻¹H alone. Let u have
an isotropic distribution, y = P^½x, and V be the eigenvectors of the symmetric K = P^-½·H·P^-½. The noise of a step
differs between eigenvectors of K: in y it is c₀·tr(HxxᵀH)·P⁻¹, and the trace equals that of K·P·K·y yᵀ. With aᵢ =
η·λᵢ(K),

    F(η) = Σᵢⱼ Λᵢⱼ · c₀·ξᵢⱼ / (1 - β² + β·(aᵢ + aⱼ - 2ξᵢⱼ)/(1 - β) - (1 + c₁)·ξᵢⱼ)        ξᵢⱼ = aᵢaⱼ(1 + β)/(aᵢ + aⱼ)
    Λ = (Vᵀ P V) ∘ (Vᵀ P⁻¹ V)        stable exactly where F(η) < 1

The rows of Λ sum to 1. If P and H commute, Λ is the identity, and F is the sum over i in `critical`. Otherwise η* is
smaller. It can even be smaller than the lower bound from the trace and the largest eigenvalue of P⁻¹H.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from zo_hf.stability.process import NEGATIVE, Array, Process, as_array, process


def critical_step_size_of_hessian(
    hessian: Any,
    preconditioner: Any = None,
    *,
    momentum: float = 0.0,
    ema: bool = False,
    num_directions: int = 1,
    direction: str = "gaussian",
    negative: str = "refuse",
) -> float:
    """Return the critical step size of a whole Hessian, for x ← x - η·P⁻¹·m with any diagonal P.

    The computation takes one eigendecomposition, O(d³) time and O(d²) memory. Its relative error is about 10⁻¹⁶ times
    the ratio of P's largest to its smallest entry.

    Args:
        hessian: symmetric, (d, d), an array or a tensor; only the lower triangle is read.
        preconditioner: P's diagonal, positive, (d,); None means all ones. Adam's is √v̂ + ε.
        direction: "gaussian" or "sphere".
        momentum, ema, num_directions, negative: as for `critical_step_size`; `negative` applies to P^-½·H·P^-½.

    Returns:
        η*; infinity if no eigenvalue is positive.

    Raises:
        ValueError: an argument is not usable; the message names it.
    """
    if direction == "rademacher":
        raise ValueError("direction='rademacher' has no formula for a Hessian that is not diagonal; use 'gaussian'.")
    if negative not in NEGATIVE:
        raise ValueError(f"negative={negative!r} must be one of {', '.join(NEGATIVE)}.")
    matrix = np.asarray(hessian.detach().cpu().double() if isinstance(hessian, torch.Tensor) else hessian, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.isfinite(matrix).all():
        raise ValueError(f"hessian of shape {matrix.shape} must be a square matrix of finite numbers.")
    diagonal = np.ones(len(matrix)) if preconditioner is None else as_array(preconditioner, "preconditioner")
    if diagonal.size != len(matrix) or diagonal.min() <= 0:
        raise ValueError(f"preconditioner must be {len(matrix)} positive numbers; add Adam's ε to √v̂.")
    method = process(momentum, ema, num_directions, direction, diagonal.size)
    root = diagonal**-0.5
    values, vectors = np.linalg.eigh(root[:, None] * matrix * root)
    if negative == "refuse" and values[0] < 0:
        raise ValueError(
            f"hessian has the eigenvalue {values[0]:.3g}, and the theory does not cover negative curvature; use "
            "negative='ignore' to leave it out."
        )
    positive = values > 0
    if not positive.any():
        return math.inf
    values, vectors = values[positive], vectors[:, positive]
    shares = (vectors.T * diagonal @ vectors) * (vectors.T / diagonal @ vectors)
    return _root(values / values[-1], shares, method) / method.weight / values[-1]


def _root(scaled: Array, shares: Array, method: Process) -> float:
    """Return the root of F = 1, for eigenvalues up to 1. In every case tried, F increases up to its pole."""
    low, high = 0.0, method.span / method.pull if method.pull > 0 else 4.0 / method.common
    while low < (middle := 0.5 * (low + high)) < high:
        if _response(middle * scaled, shares, method) < 1:
            low = middle
        else:
            high = middle
    return middle


def _response(steps: Array, shares: Array, method: Process) -> float:
    """Return F for a = η·λ."""
    beta = method.momentum
    sums = steps[:, None] + steps
    curved = np.outer(steps, steps) * (1 + beta) / sums
    room = 1 - beta**2 + beta * (sums - 2 * curved) / (1 - beta) - (1 + method.own) * curved
    return method.common * float((shares * curved / room).sum())
