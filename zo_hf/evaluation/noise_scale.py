"""The gradient noise scale, from the numbers of rows that share a direction.

After McCandlish et al. (arXiv 1812.06162): B_s = E‖∇ℓ_row − g‖² / ‖g‖², with g the mean gradient of all rows. A batch of
B_s rows has as much noise as gradient. Larger batches, or more directions, pay as long as B is below B_s.

In some steps, groups of rows share directions in pairs. With u = ∇ℓ·z of a group, scaled to the loss of the whole batch,
and E[z zᵀ] = I:

    E[u₁ · u₂] = ‖g‖²        E[u²] = ‖g‖² + Σ² / k        B_s = k · (E[u²] / E[u₁ · u₂] − 1)

with k rows in a group, and Σ² the variance of a row's gradient. Both means are running ones.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Part of the running sums that a measurement keeps; about twenty measurements count.
_KEPT = 0.95
_LEAST_PAIRS = 16


class NoiseScale:
    """Running means of products and squares.

    Args:
        every: number of steps between measurements; 0 never measures.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._products, self._squares, self._pairs = 0.0, 0.0, 0

    def due(self, step: int) -> bool:
        """Return whether groups share their directions in pairs at this step."""
        return self._every > 0 and step % self._every == self._every - 1

    def shared(self, direction: int, num_directions: int, step: int) -> int:
        """Return the direction that stands for another one: at a measured step, that of the first group of a pair.

        Args:
            direction: index of the direction in the step, group · num_directions + direction in the group.
            num_directions: directions of a group.
            step: the step.
        """
        return direction - num_directions if self.due(step) and direction // num_directions % 2 else direction

    def see(self, numbers: Sequence[float], num_directions: int) -> None:
        """Take the projected gradients of a measured step, in the order of the directions."""
        groups = len(numbers) // num_directions
        pairs = [
            (numbers[first], numbers[first + num_directions])
            for group in range(0, groups - 1, 2)
            for first in range(group * num_directions, (group + 1) * num_directions)
        ]
        pairs = [pair for pair in pairs if all(pair)]  # a step of fewer micro-batches has zeros at its end
        if not pairs:
            return
        scale = groups * groups / len(pairs)
        self._products = _KEPT * self._products + scale * sum(one * other for one, other in pairs)
        self._squares = _KEPT * self._squares + scale * sum(one * one + other * other for one, other in pairs) / 2
        self._pairs += len(pairs)

    def value(self, rows_per_group: float) -> float | None:
        """Return B_s in rows; None before there are enough pairs, or while noise hides the gradient."""
        if self._pairs < _LEAST_PAIRS or self._products <= 0:
            return None
        return max(0.0, rows_per_group * (self._squares / self._products - 1))

    def state(self) -> list[float]:
        """Return the running sums, for a checkpoint."""
        return [self._products, self._squares, self._pairs]

    def load_state(self, state: Sequence[float]) -> None:
        """Restore what `state` returned."""
        self._products, self._squares, self._pairs = state[0], state[1], int(state[2])
