"""The account of private training: the ε at a δ that its steps so far have cost.

Two data sets are neighbors if one has a row that the other lacks. Each step is a Gaussian mechanism on a Poisson sample:
q = B/n, noise multiplier σ. Privacy loss distributions compose exactly up to their grid, whose values are rounded up (Koskela
et al., arXiv 1906.03049; Doroshenko et al., arXiv 2207.04380). Google's dp-accounting computes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class Guarantee:
    """Promises of a run to everybody whose row is in its data.

    Args:
        noise_multiplier: σ.
        rows: n, number of rows of the data, which counts as public.
        expected_rows: B, expected number of rows of a step.
        delta: δ.
    """

    noise_multiplier: float
    rows: int
    expected_rows: int
    delta: float

    def epsilon(self, steps: int) -> float:
        """Return ε at δ after a number of steps; infinity without noise."""
        if not steps:
            return 0.0
        if not self.noise_multiplier:
            return math.inf
        one = _loss_of_a_step(self.noise_multiplier, self.expected_rows / self.rows)
        return float(one.self_compose(steps).get_epsilon_for_delta(self.delta))

    def curve(self, steps: int, epsilons: Sequence[float]) -> list[tuple[float, float]]:
        """Return (ε, δ) for every ε after a number of steps, at least one; without noise, δ is 1."""
        if not self.noise_multiplier:
            return [(epsilon, 1.0) for epsilon in epsilons]
        loss = _loss_of_a_step(self.noise_multiplier, self.expected_rows / self.rows).self_compose(steps)
        return [(epsilon, float(loss.get_delta_for_epsilon(epsilon))) for epsilon in epsilons]

    def steps_within(self, epsilon: float, most: int) -> int:
        """Return the largest number of steps, at most `most`, whose ε does not exceed `epsilon`."""
        low, high = 0, 1
        while high < most and self.epsilon(high) <= epsilon:
            low, high = high, 2 * high
        high = min(high, most)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.epsilon(middle) <= epsilon else (low, middle - 1)
        return low


def default_delta(rows: int) -> float:
    """Return the largest power of ten below 1/n: each row may be given away with a probability below 1/n."""
    # Of whole numbers, because a logarithm may round to the next power.
    return 10.0 ** -len(str(rows))


def check_installed() -> None:
    """Refuse a run whose ε nobody could compute.

    Raises:
        ValueError: dp-accounting is not installed.
    """
    if find_spec("dp_accounting") is None:
        raise ValueError(
            "zo_dp_noise_multiplier above 0 needs dp-accounting, which computes epsilon; install it with "
            "pip install 'zo_hf[private]'."
        )


@lru_cache(maxsize=4)
def _loss_of_a_step(noise_multiplier: float, sampling_rate: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(noise_multiplier, sampling_prob=sampling_rate)
