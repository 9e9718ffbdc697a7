"""The search for a learning rate by short trials, the same for every method.

The first trials use a center, and rates that are `ratio` times larger and smaller. If the best rate is the largest or the
smallest, the next trial goes one step further; otherwise it lies between the best rate and its better neighbor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def first_rates(center: float, ratio: float, trials: int) -> list[float]:
    """Return the learning rates of a method's first trials."""
    return [center, center * ratio, center / ratio][:trials]


def next_rate(losses: Mapping[float, float], ratio: float) -> float:
    """Return a rate beyond the best one if that is at an end, else between the best one and its better neighbor."""
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda i: finite(losses[rates[i]]))
    if at == len(rates) - 1:
        return rates[at] * ratio
    if at == 0:
        return rates[at] / ratio
    neighbor = min(rates[at - 1], rates[at + 1], key=lambda rate: finite(losses[rate]))
    return math.sqrt(rates[at] * neighbor)


def finite(loss: float) -> float:
    """Return the loss, or infinity if it is not finite, so that losses can be compared."""
    return loss if math.isfinite(loss) else math.inf
