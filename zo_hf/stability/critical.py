"""The largest step size that is stable in mean square (arXiv 2604.14669, theorems 1 to 3; here for more processes).

The setting is the full batch, a constant step size η and the quadratic ½xᵀHx with H ⪰ 0. The two-point estimates g
along u are exact there at any distance, and m ← β·m + g, x ← x - η·m. With aᵢ = η·λᵢ, and c₀ and c₁ of
`zo_hf.stability.process`,

    F(η) = Σᵢ c₀·aᵢ·(1 + β) / (2·(1 - β²) - aᵢ·[(1 - β) + c₁·(1 + β)])        stable exactly where F(η) < 1

For one Gaussian direction and β = 0: Σᵢ aᵢ / (2·(1 - aᵢ)) < 1. The trace and the largest eigenvalue bound the η* at
which F = 1:

    2·(1 - β) / (c₀·Tr + λmax·[c₁ + (1 - β)/(1 + β)])  ≤  η*  ≤  2·(1 - β) / (c₀·Tr)

If the bracket is negative (random signs with momentum, q·(1 - β) < 1 + β), the two bounds change places.

If each of G groups of rows has q directions of its own, and its share of the loss the Hessian H/G, then ĝ is a mean over
q·G directions: q·G takes the place of q. Noise of batches that does not depend on x leaves η* as it is, see `moments`.

A moving average m ← β·m + (1 - β)·g replaces η by η·(1 - β). A preconditioned step x ← x - η·P⁻¹·m replaces λᵢ by
λᵢ/Pᵢ if P is diagonal in H's eigenbasis; for any other P see `zo_hf.stability.preconditioned`.
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
    """Return the critical step size η*: below it E[‖x‖²] stays bounded, and x vanishes outside the null space of H.

    Args:
        eigenvalues: all d eigenvalues of the Hessian, a list, an array or a tensor, (d,). Zeros have no effect, except
            that they count in the dimension of the sphere.
        momentum: β of m ← β·m + g, x ← x - η·m.
        ema: True for m ← β·m + (1 - β)·g. Zeroth-order Adam with constant second moments is of this form, with β₁ as
            `momentum` and √v̂ + ε as `preconditioner`.
        num_directions: q, the number of directions whose estimates are averaged; q·G with directions for G groups of rows.
        direction: "gaussian", "sphere" (of radius √d) or "rademacher". Random signs depend on the basis in which they
            are drawn; the result is exact if H is diagonal in it.
        preconditioner: diagonal of P in the eigenbasis of H, positive, (d,), for x ← x - η·P⁻¹·m. If P does not
            commute with H, use `critical_step_size_of_hessian`: the eigenvalues of P⁻¹H would give too large a step
            size.
        negative: treatment of negative eigenvalues: "refuse" them, or "ignore" them, as if they were zero.

    Returns:
        η*; infinity if no eigenvalue is positive.

    Raises:
        ValueError: an argument is not usable; the message names it.
    """
    values = spectrum(eigenvalues, preconditioner, negative)
    method = process(momentum, ema, num_directions, direction, values.size)
    largest = float(values.max())
    if largest == 0:
        return math.inf
    # With the spectrum scaled to 1 nothing overflows, and the root is accurate to the last digit in any unit.
    scaled = values[values > 0] / largest
    bounds = _bounds(float(scaled.sum()), 1.0, method)
    return _root(scaled, method, min(bounds), max(bounds)) / method.weight / largest


def _root(scaled: Array, method: Process, low: float, high: float) -> float:
    """Return the root of F = 1 between bounds, for eigenvalues up to 1.

    Newton's method for log F in log η, with bisection whenever a step would leave the bracket.
    """
    numerator, pull, span = method.common * (1 + method.momentum), method.pull, method.span
    low, high = low * (1 - 1e-12), high * (1 + 1e-12)  # with a single eigenvalue the root is a bound itself
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
    """Return the bounds on η* from trace and λmax, and from the trace alone, for an average with weight 1."""
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
    """Bound the critical step size by the trace and the largest eigenvalue of H ⪰ 0.

    With a preconditioner P that commutes with H, pass the trace and the largest eigenvalue of P⁻¹H.

    Args:
        trace: the trace of the Hessian, a number, or an array or tensor of any shape.
        lambda_max: its largest eigenvalue, of a shape that broadcasts with `trace`.
        dimension: d, which only direction="sphere" needs.
        momentum, ema, num_directions, direction: as for `critical_step_size`.

    Returns:
        Lower and upper bound, floats for numbers and float64 arrays otherwise. A bound is infinite where the trace, or
        an estimate of it, is zero or negative.

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
    """Return whether the step size is below the critical one; arguments as for `critical_step_size`.

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
    """Return 2 / (λmax·Σ_{k<K} γᵏ): below it, coherent coordinate descent (`zo_hf.rules.cocd`) converges.

    It is exact if the Hessian is diagonal in the coordinates, where a difference is measured once a cycle and applied
    K times. For other Hessians neither a counterexample nor a proof is known.

    Args:
        lambda_max: largest eigenvalue of the Hessian.
        num_blocks: K, the number of steps in a cycle over the remembered coordinates.
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
