"""Poisson sampling: every row of the data is in a step with the same probability, whatever the other rows do.

A step of n rows with B expected ones takes each with q = B/n. The number of rows varies, B ± √B. That is what the
accountant assumes. With batches of a fixed size from a shuffled epoch, which are common elsewhere, its ε would be too small
(Chua et al., "How private are DP-SGD implementations?", arXiv 2403.17673).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from zo_hf.privacy.secret import Secret


class PoissonSampling:
    """The rows of every step, divided into parts for micro-batches and processes.

    Args:
        secret: decides which rows a step has.
        rows: n, number of rows of the data.
        expected: B, expected number of rows of a step.
        parts: number of micro-batches of a step, on all processes together.

    Raises:
        ValueError: a step would have more rows than there are.
    """

    def __init__(self, secret: Secret, rows: int, expected: int, parts: int) -> None:
        if expected > rows:
            raise ValueError(
                f"a private step of {expected} rows needs a train_dataset with as many, and it has {rows}; use a smaller "
                "per_device_train_batch_size."
            )
        self._secret, self._rows, self._expected, self._parts = secret, rows, expected, parts
        self._sampled = lru_cache(maxsize=2)(self._sample)

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps after which every row has been drawn once on average, at least 1."""
        return max(1, round(self._rows / self._expected))

    def rows_of(self, step: int) -> np.ndarray:
        """Return the rows of a step in ascending order, int64 (rows of the step,)."""
        return self._sampled(step)

    def part(self, step: int, number: int) -> tuple[int, list[int]]:
        """Return the place in the step of a part's first row, and its rows; parts differ by one row at most."""
        rows = self.rows_of(step)
        first, last = (len(rows) * k // self._parts for k in (number, number + 1))
        return first, rows[first:last].tolist()

    def _sample(self, step: int) -> np.ndarray:
        if self._expected == self._rows:
            return np.arange(self._rows)
        below = np.uint64((self._expected << 64) // self._rows)
        return np.flatnonzero(self._secret.words("rows", step, self._rows) < below)
