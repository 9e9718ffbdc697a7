"""The parameters of a method and of a spectrum that stability theory needs.

On a quadratic ½xᵀHx the estimate g from q directions u has, given x, these second moments along H's eigenvectors:

    E[g gᵀ]ᵢᵢ = (1 + c₁)·(λᵢxᵢ)² + c₀·Σⱼ (λⱼxⱼ)²

    gaussian     c₀ = 1/q      c₁ = 1/q
    sphere       c₀ = κ/q      c₁ = (2κ - 1)/q      κ = d/(d + 2), ‖u‖ = √d
    rademacher   c₀ = 1/q      c₁ = -1/q            only where the basis that signs are drawn in is H's own

For Gaussian directions and the sphere this is Isserlis' theorem, in any basis. For random signs uᵢ² = 1, so one
direction has E[gᵢ²] = E[(Σⱼ uⱼλⱼxⱼ)²] = Σⱼ (λⱼxⱼ)². The mean over q directions keeps (λᵢxᵢ)² and 1/q of the rest. Only
the diagonal of E[x xᵀ] enters, so it has a recursion of its own. If H is not diagonal in that basis, fourth moments of
u enter as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
DIRECTIONS = ("gaussian", "sphere", "rademacher")
NEGATIVE = ("refuse", "ignore")


@dataclass(frozen=True)
class Process:
    """The parameters of a method that determine its stability.

    Args:
        momentum: β of m ← β·m + w·g, x ← x - η·m.
        weight: w: 1, or 1 - β for an exponential moving average.
        common: c₀, the noise that each mode receives from all modes.
        own: c₁, the noise that each mode receives from itself in addition.
    """

    momentum: float
    weight: float
    common: float
    own: float

    @property
    def pull(self) -> float:
        """The k of F(a) = Σ c₀·a·(1 + β) / (2·(1 - β²) - k·a); for k > 0 a mode's noise is unbounded at the pole."""
        return 1 - self.momentum + self.own * (1 + self.momentum)

    @property
    def span(self) -> float:
        """The constant 2·(1 - β²) in the denominator of F; the pole is at a = span / pull."""
        return 2 * (1 - self.momentum) * (1 + self.momentum)


def process(momentum: float, ema: bool, num_directions: int, direction: str, dimension: int | None) -> Process:
    """Return the process for these options.

    Raises:
        ValueError: an option is not usable; the message names it.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must be at least 0 and less than 1.")
    if num_directions < 1:
        raise ValueError(f"num_directions={num_directions} must be at least 1.")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is not covered by the theory; use one of {', '.join(DIRECTIONS)}.")
    common, own = 1.0, 1.0
    if direction == "rademacher":
        own = -1.0
    elif direction == "sphere":
        if dimension is None:
            raise ValueError("direction='sphere' needs dimension, the number of coordinates.")
        if dimension < 1:
            raise ValueError(f"dimension={dimension} must be at least 1.")
        common = dimension / (dimension + 2)
        own = (dimension - 2) / (dimension + 2)
    weight = 1 - momentum if ema else 1.0
    return Process(momentum, weight, common / num_directions, own / num_directions)


def as_array(values: Any, name: str) -> Array:
    """Convert a list, an array or a tensor of real numbers to a vector of finite float64.

    Raises:
        ValueError: `values` is not a vector of finite real numbers; the message names the argument `name`.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values if values.is_complex() else values.double()
    array = np.asarray(values)
    if np.iscomplexobj(array):
        raise ValueError(f"{name} must be real; compute those of P⁻¹H from the symmetric P^-½·H·P^-½.")
    array = array.astype(np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must be a vector of at least one number, not of shape {tuple(array.shape)}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite; drop the entries that are not.")
    return array


def spectrum(eigenvalues: Any, preconditioner: Any, negative: str) -> Array:
    """Return λ/P, the eigenvalues that η multiplies, none of them negative.

    Raises:
        ValueError: an argument is not usable; the message names it.
    """
    if negative not in NEGATIVE:
        raise ValueError(f"negative={negative!r} must be one of {', '.join(NEGATIVE)}.")
    values = as_array(eigenvalues, "eigenvalues")
    if preconditioner is not None:
        scale = as_array(preconditioner, "preconditioner")
        if scale.shape != values.shape:
            raise ValueError(
                f"preconditioner has {scale.size} entries for {values.size} eigenvalues; give one for each."
            )
        if scale.min() <= 0:
            raise ValueError("preconditioner must be positive; add Adam's ε to it.")
        with np.errstate(over="ignore"):
            values = as_array(values / scale, "eigenvalues / preconditioner")
    if negative == "refuse" and values.min() < 0:
        raise ValueError(
            f"eigenvalues contains {values.min():.3g}, and the theory does not cover negative curvature; use "
            "negative='ignore' to leave it out."
        )
    return np.maximum(values, 0.0)
