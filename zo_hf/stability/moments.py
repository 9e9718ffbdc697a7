"""Exact second moments of zeroth-order descent on a quadratic (the recursion behind arXiv 2604.14669).

For every eigenvector i of H, with a step x ← x - (η/P)·m, m ← β·m + w·g and A = E[x²], B = E[x·m], C = E[m²],

    C ← β²·C + 2βw·λB + w²·[(1 + c₁)·λ²A + c₀·Σⱼ λⱼ²Aⱼ]
    B ← βB + wλA - (η/P)·C        A ← A - 2·(η/P)·(βB + wλA) + (η/P)²·C        (both with the new C)

In a step of G groups of rows with q directions each, the share of group g has the gradient Hx/G + n_g. Let the n_g be
independent of each other and of x, with E[n_g n_gᵀ] = S/G. Then ĝ has, with c₀(q) and c₁(q) of `process`,

    E[ĝ ĝᵀ]ᵢᵢ = (1 + c₁(qG))·λᵢ²Aᵢ + c₀(qG)·Σⱼ λⱼ²Aⱼ + (1 + c₁(q))·Sᵢᵢ + c₀(q)·Tr S

because c₀(q)/G = c₀(qG), and the same for c₁. So groups average the noise of directions and not that of batches, which
is added to C and does not change the operator below: its growth is that of q·G directions.

Only the sum couples the modes, so the operator is block diagonal with blocks of 3 × 3, plus a matrix of rank one. It
maps covariances to covariances; therefore its spectral radius ρ is an eigenvalue, and the largest root of

    Σᵢ rᵢ(z) = 1        rᵢ(z): the response c₀·λᵢ²Aᵢ of mode i to a unit of noise in all modes

At the spectral radius of mode i alone, which includes its own share of the noise, rᵢ is 1; beyond it rᵢ decreases with
z. So exactly one root is at or above the largest of these radii, and it is ρ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from zo_hf.stability.process import Array, Process, as_array, process, spectrum

_MAX_ITERATIONS = 200
# Limit on η·λ. The growth is of the order of its square, and the value of the cubic is of the order of its sixth
# power.
_LARGEST_STEP = 1e50


def moment_growth(
    step_size: float,
    eigenvalues: Any,
    *,
    momentum: float = 0.0,
    ema: bool = False,
    num_directions: int = 1,
    direction: str = "gaussian",
    preconditioner: Any = None,
    negative: str = "refuse",
) -> float:
    """Return the long-run growth of second moments per step, which is the spectral radius of the exact operator.

    The growth is 1 at `critical_step_size`, and less below it. Directions in the null space of H are left out, because
    x does not contract there at any step size. The result is infinity if η·λ exceeds 10⁵⁰. O(d) in time and memory.

    Args:
        step_size: η, at least 0.
        eigenvalues, momentum, ema, num_directions, direction, preconditioner, negative: as for `critical_step_size`.

    Raises:
        ValueError: an argument is not usable; the message names it.
    """
    if not 0 <= step_size < np.inf:
        raise ValueError(f"step_size={step_size} must be at least 0 and finite.")
    values = spectrum(eigenvalues, preconditioner, negative)
    method = process(momentum, ema, num_directions, direction, values.size)
    with np.errstate(over="ignore"):
        steps, counts = np.unique((step_size * method.weight) * values, return_counts=True)
    moving = steps > 0
    if not moving.any():
        return 1.0
    if steps[-1] > _LARGEST_STEP:
        return np.inf
    return 1 + _joint_excess(steps[moving], counts[moving].astype(np.float64), method)


def _single_mode_excess(steps: Array, method: Process) -> float:
    """Return the largest spectral radius of a single mode, minus 1: the largest root of the modes' cubics.

    Beyond its largest root such a polynomial is convex and increasing, so Newton's method descends to the root from
    above and never passes it. The maximum over the modes' iterates therefore never passes the largest of their roots.
    """
    beta, share = method.momentum, 1 + method.own + method.common
    # An upper bound, from m ← β·m + g and λx ← λx - a·m, where the root mean square of g is at most √share·λx.
    excess = ((1 + share**0.5) * (1 + float(steps.max()))) ** 2
    for _ in range(_MAX_ITERATIONS):
        z = 1 + excess
        inner = excess * (excess + 1 - beta) + 2 * steps * z
        d_inner = 2 * excess + 1 - beta + 2 * steps
        value = inner * (z - beta**2) + 2 * beta * steps * z * (steps + excess) - share * steps**2 * z * (z + beta)
        slope = (
            d_inner * (z - beta**2)
            + inner
            + 2 * beta * steps * (steps + excess + z)
            - share * steps**2 * (2 * z + beta)
        )
        following = float((excess - value / slope).max())
        if not following < excess - 1e-16:
            break
        excess = following
    return excess


def _responses(excess: float, steps: Array, method: Process) -> Array:
    """Return rᵢ at z = 1 + excess, from the recursion's steady state at growth z with unit noise in every mode."""
    beta, z = method.momentum, 1 + excess
    inner = excess * (excess + 1 - beta) + 2 * steps * z
    noise = steps**2 * z * (z + beta)
    rest = inner * (z - beta**2) + 2 * beta * steps * z * (steps + excess) - (1 + method.own) * noise
    with np.errstate(invalid="ignore"):  # at z = 0 the mode's state vanishes in one step
        return method.common * noise / rest


def _joint_excess(steps: Array, counts: Array, method: Process) -> float:
    """Return the root of Σ rᵢ = 1 above the single modes' radii, minus 1, by bisection to the last digit."""

    def total_response(excess: float) -> float:
        return float(counts @ _responses(excess, steps, method))

    low = _single_mode_excess(steps, method)
    width = max(abs(low), 1e-16)
    while total_response(low + width) > 1:
        width *= 2
    high = low + width
    while True:
        middle = 0.5 * (low + high)
        if not low < middle < high or high - low <= 1e-17:
            return middle
        if total_response(middle) > 1:
            low = middle
        else:
            high = middle


def _estimate_square(squares: Array, method: Process) -> Array:
    """Return the diagonal of E[ĝ ĝᵀ] for gradients whose second moments have the diagonal `squares`, both (d,)."""
    return (1 + method.own) * squares + method.common * squares.sum()


@dataclass(frozen=True)
class Moments:
    """Second moments in the eigenbasis of H, each (d,) float64.

    Args:
        position: E[x²].
        mixed: E[x·m].
        velocity: E[m²] of the momentum buffer m.
    """

    position: Array
    mixed: Array
    velocity: Array

    @classmethod
    def at(cls, position: Any) -> Moments:
        """Return the moments of a run that begins at x with m = 0.

        Args:
            position: x in the eigenbasis of H, (d,).
        """
        square = as_array(position, "position") ** 2
        return cls(square, np.zeros_like(square), np.zeros_like(square))


def next_moments(
    moments: Moments,
    step_size: float,
    eigenvalues: Any,
    *,
    momentum: float = 0.0,
    ema: bool = False,
    num_directions: int = 1,
    direction: str = "gaussian",
    preconditioner: Any = None,
    groups: int = 1,
    batch_noise: Any = None,
) -> Moments:
    """Return the moments one step later; the expected loss is then ½·Σ λᵢ·position.

    Args:
        moments: the moments of d modes.
        step_size, eigenvalues, momentum, ema, num_directions, direction, preconditioner: as for `moment_growth`, in
            the order of the moments. Negative eigenvalues are allowed here.
        groups: G, the number of groups of rows with `num_directions` directions each.
        batch_noise: Sᵢᵢ, the variance of the batch's gradient along each eigenvector of H, (d,); None is the full batch.

    Raises:
        ValueError: an argument is not usable; the message names it.
    """
    values = as_array(eigenvalues, "eigenvalues")
    scale = np.ones_like(values) if preconditioner is None else as_array(preconditioner, "preconditioner")
    if groups < 1:
        raise ValueError(f"groups={groups} must be at least 1.")
    method = process(momentum, ema, num_directions * groups, direction, values.size)
    beta, weight, eta = method.momentum, method.weight, step_size / scale
    square = _estimate_square(values**2 * moments.position, method)
    if batch_noise is not None:
        of_a_group = process(momentum, ema, num_directions, direction, values.size)
        square = square + _estimate_square(as_array(batch_noise, "batch_noise"), of_a_group)
    velocity = beta**2 * moments.velocity + 2 * beta * weight * values * moments.mixed + weight**2 * square
    along = beta * moments.mixed + weight * values * moments.position
    position = moments.position - 2 * eta * along + eta**2 * velocity
    return Moments(position, along - eta * velocity, velocity)
