"""The search for a learning rate by short trials, the same for every method.

The first rates are a center, and `ratio` times more and less. If the best rate is the largest or the smallest, the next one
goes one step further; otherwise it lies between the best rate and its better neighbor. If the best rate is still the largest
or the smallest after the number of rates that was asked for, up to as many follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def first_rates(center: float, ratio: float, number: int) -> list[float]:
    """Return the first learning rates that a method tries, at most `number`."""
    return [center, center * ratio, center / ratio][:number]


def next_rate(losses: Mapping[float, float], ratio: float) -> float:
    """Return a rate beyond the best one if that is at an end, else between the best one and its better neighbor."""
    rates = sorted(losses)
    at = rates.index(best_rate(losses))
    if at == len(rates) - 1:
        return rates[at] * ratio
    if at == 0:
        return rates[at] / ratio
    neighbor = min(rates[at - 1], rates[at + 1], key=lambda rate: finite(losses[rate]))
    return math.sqrt(rates[at] * neighbor)


def is_complete(losses: Mapping[float, float], number: int) -> bool:
    """Return whether the search is over, given the losses so far.

    Args:
        losses: the loss of each rate.
        number: number of rates that was asked for. With fewer than three, the best rate is always at an end, and no
            more follow.
    """
    return len(losses) >= number and (number < 3 or not is_at_edge(losses) or len(losses) == 2 * number)


def is_at_edge(losses: Mapping[float, float]) -> bool:
    """Return whether the best of several rates is the largest or the smallest, so that a better one may lie beyond."""
    return len(losses) > 1 and best_rate(losses) in (min(losses), max(losses))


def best_rate(losses: Mapping[float, float]) -> float:
    """Return the rate with the least loss, and the smallest of those with the same."""
    return min(sorted(losses), key=lambda rate: finite(losses[rate]))


def finite(loss: float) -> float:
    """Return the loss, or infinity if it is not finite, so that losses can be compared."""
    return loss if math.isfinite(loss) else math.inf
