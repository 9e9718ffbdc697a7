"""A mean over random samples, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Measured:
    """A measured value with its standard error.

    Args:
        value: the mean over the samples.
        standard_error: the standard error of the mean; infinite for a single sample.
        count: number of samples.
    """

    value: float
    standard_error: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Measured:
        """Return the mean of independent samples, at least one."""
        count, mean = len(samples), math.fsum(samples) / len(samples)
        return cls(mean, math.sqrt(variance(samples) / count), count)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the confidence interval of the true mean by Student's t, for samples that are nearly normal."""
        reach = self.standard_error
        if math.isfinite(reach):
            reach *= student_quantile(0.5 + confidence / 2, self.count - 1)
        return self.value - reach, self.value + reach


def variance(samples: Sequence[float]) -> float:
    """Return the unbiased estimate of the variance of independent samples; infinite for a single sample."""
    if len(samples) < 2:
        return math.inf
    mean = math.fsum(samples) / len(samples)
    return math.fsum((sample - mean) ** 2 for sample in samples) / (len(samples) - 1)


def student_quantile(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t, within 1 % for a probability up to 0.975 and at least 4 degrees of freedom.

    This is the expansion around the normal quantile in 1/degrees (Abramowitz and Stegun, 26.7.5).
    """
    x = NormalDist().inv_cdf(probability)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / degrees ** (i + 1) for i, term in enumerate(terms))
