"""The largest step size that is stable in mean square (arXiv 2604.14669, theorems 1 to 3; here for more processes).

Full batch, constant step size η, the quadratic ½xᵀHx with H ⪰ 0, two-point estimates g along u (which are exact there
whatever the distance is), m ← β·m + g, x ← x - η·m. With aᵢ = η·λᵢ, and c₀ and c₁ of `zo_hf.stability.process`,

    F(η) = Σᵢ c₀·aᵢ·(1 + β) / (2·(1 - β²) - aᵢ·[(1 - β) + c₁·(1 + β)])        stable exactly where F(η) < 1

For one Gaussian direction and β = 0: Σᵢ aᵢ / (2·(1 - aᵢ)) < 1. Trace and largest eigenvalue alone give bounds on the η*
where F = 1,

    2·(1 - β) / (c₀·Tr + λmax·[c₁ + (1 - β)/(1 + β)])  ≤  η*  ≤  2·(1 - β) / (c₀·Tr)

the other way round where the bracket is negative (signs with momentum, q·(1 - β) < 1 + β). A moving average
m ← β·m + (1 - β)·g has η·(1 - β) for η. A preconditioned step x ← x - η·P⁻¹·m has λᵢ/Pᵢ for λᵢ, where P is diagonal
in H's eigenbasis; for another P see `zo_hf.stability.preconditioned`.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np

from zo_hf.stability.process import Array, Process, process, spectrum

_MAX_ITERATIONS = 200

Number = TypeVar("Number", float, Array)


def critical_step_size(
    eigenvalues: Any,
    *,
    momentum: float = 0.0,
    ema: bool = False,
    num_directions: int = 1,
    direction: str = "gaussian",
    preconditioner: Any = None,
    negative: str = "refuse",
) -> float:
    """The step size below which E[‖x‖²] stays bounded, and its part that the Hessian sees vanishes.

    Args:
        eigenvalues: all d of the Hessian, a list, an array or a tensor, (d,). Zeros count for the sphere's dimension and
            for nothing else.
        momentum: β of m ← β·m + g, x ← x - η·m.
        ema: m ← β·m + (1 - β)·g instead. Zeroth-order Adam whose second moments stand still has this, with β₁ as
            `momentum` and √v̂ + ε as `preconditioner`.
        num_directions: q, whose estimates are averaged.
        direction: "gaussian", "sphere" (of radius √d) or "rademacher". Random signs depend on the basis that they are
            drawn in; this is exact where H is diagonal in it.
        preconditioner: diagonal of P in the eigenbasis of H, positive, (d,), as x ← x - η·P⁻¹·m. One that does not
            commute with H has no place in this formula: the eigenvalues of P⁻¹H (those of P^-½·H·P^-½) give a step size
            that is too large; use `critical_step_size_of_hessian`.
        negative: what to do with negative eigenvalues: "refuse", or "ignore" them, as if they were zero.

    Returns:
        η*; infinity where no eigenvalue is positive.

    Raises:
        ValueError: an argument is not usable; the message names it.
    """
    values = spectrum(eigenvalues, preconditioner, negative)
    method = process(momentum, ema, num_directions, direction, values.size)
    largest = float(values.max())
    if largest == 0:
        return math.inf
    # Of the scaled spectrum: nothing overflows, and a root is found to the last place whatever the unit is.
    scaled = values[values > 0] / largest
    bounds = _bounds(float(scaled.sum()), 1.0, method)
    return _root(scaled, method, min(bounds), max(bounds)) / method.weight / largest


def _root(scaled: Array, method: Process, low: float, high: float) -> float:
    """Where F is 1, between bounds, for eigenvalues up to 1: Newton's method for log F in log η, kept in the bracket."""
    numerator, pull, span = method.common * (1 + method.momentum), method.pull, method.span
    low, high = low * (1 - 1e-12), high * (1 + 1e-12)  # one eigenvalue attains its bound
    if pull > 0:
        high = min(high, span / pull)
    eta = low
    for _ in range(_MAX_ITERATIONS):
        room = span - (pull * eta) * scaled
        terms = scaled / room
        value = numerator * eta * float(terms.sum())
        if not room.min() > 0 or value >= 1:
            high = min(high, eta)
        else:
            low = max(low, eta)
        slope = numerator * eta * span * float((terms / room).sum()) / value  # d log F / d log η
        following = eta * math.exp(-math.log(value) / slope) if value > 0 else high
        if not low < following < high:
            following = 0.5 * (low + high)
        if abs(following - eta) <= 2e-16 * eta or not low < following < high:
            return following
        eta = following
    return eta


def _bounds(trace: Number, largest: Number, method: Process) -> tuple[Number, Number]:
    """Of η* without the weight of a moving average: by the trace and λmax, and by the trace alone."""
    top, share = 2 * (1 - method.momentum), method.common * trace
    return top / (share + largest * (method.pull / (1 + method.momentum))), top / share


def step_size_bounds(
    trace: Any,
    lambda_max: Any,
    *,
    momentum: float = 0.0,
    ema: bool = False,
    num_directions: int = 1,
    direction: str = "gaussian",
    dimension: int | None = None,
) -> tuple[Any, Any]:
    """Bounds on the critical step size by trace and largest eigenvalue, for H ⪰ 0; of P⁻¹H if P commutes with H.

    Args:
        trace: of the Hessian, a number or an array of any shape (a tensor counts as one).
        lambda_max: its largest eigenvalue, of a shape that goes with it.
        dimension: d, which only direction="sphere" needs.
        momentum, ema, num_directions, direction: as for `critical_step_size`.

    Returns:
        Lower and upper bound, floats for numbers and float64 arrays otherwise. What bounds nothing is infinite: a
        trace of 0, or an estimate of one that came out negative.

    Raises:
        ValueError: an argument is not usable; the message names it.
    """
    method = process(momentum, ema, num_directions, direction, dimension)
    traces, largest = np.asarray(trace, dtype=np.float64), np.asarray(lambda_max, dtype=np.float64)
    with np.errstate(divide="ignore", over="ignore"):
        bounds = [np.where(bound <= 0, np.inf, bound) / method.weight for bound in _bounds(traces, largest, method)]
    lower, upper = np.minimum(*bounds), np.maximum(*bounds)
    return (lower, upper) if lower.ndim else (float(lower), float(upper))


def is_stable(
    step_size: float,
    eigenvalues: Any,
    *,
    momentum: float = 0.0,
    ema: bool = False,
    num_directions: int = 1,
    direction: str = "gaussian",
    preconditioner: Any = None,
    negative: str = "refuse",
) -> bool:
    """Whether the step size is below the critical one; arguments as for `critical_step_size`.

    Raises:
        ValueError: an argument is not usable; the message names it.
    """
    if not step_size >= 0:
        raise ValueError(f"step_size={step_size} must be at least 0.")
    return step_size < critical_step_size(
        eigenvalues,
        momentum=momentum,
        ema=ema,
        num_directions=num_directions,
        direction=direction,
        preconditioner=preconditioner,
        negative=negative,
    )


def cocd_critical_step_size(lambda_max: float, num_blocks: int, decay: float) -> float:
    """The step size below which coherent coordinate descent (`zo_hf.optimizers.cocd`) converges, 2 / (λmax·Σ_{k<K} γᵏ).

    It is exact where the Hessian is diagonal in the coordinates: a difference is measured once in a cycle and applied K
    times. For other Hessians no counterexample is known, and no proof.

    Args:
        lambda_max: largest eigenvalue of the Hessian.
        num_blocks: K, steps in a cycle over the coordinates that are remembered.
        decay: γ, at least 0 and at most 1; 0 is block cyclic coordinate descent.

    Returns:
        The step size; infinity for λmax = 0.

    Raises:
        ValueError: an argument is not usable; the message names it.
    """
    if not 0 <= lambda_max < math.inf:
        raise ValueError(f"lambda_max={lambda_max} must be at least 0 and finite.")
    if num_blocks < 1:
        raise ValueError(f"num_blocks={num_blocks} must be at least 1.")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay} must be at least 0 and at most 1.")
    if decay in (0, 1):
        applied = float(num_blocks if decay else 1)
    else:
        applied = -math.expm1(num_blocks * math.log(decay)) / (1 - decay)
    return 2 / lambda_max / applied if lambda_max else math.inf
