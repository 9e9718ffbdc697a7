"""A warning for a loss that does not change between probes, from which nothing can be learned."""

from __future__ import annotations

import logging
from collections.abc import Sequence

logger = logging.getLogger(__name__)

STEPS = 20


class FlatLossWarning:
    """Warns once when every projected gradient has been exactly 0 for 20 steps running."""

    def __init__(self) -> None:
        self._steps = 0

    def see(self, projected_gradients: Sequence[float], eps: float) -> None:
        """Look at one step's projected gradients, given the distance `eps` of its probes."""
        self._steps = 0 if any(projected_gradients) else self._steps + 1
        if self._steps == STEPS:
            logger.warning(
                "the loss was the same at all probes of the last %d steps, so nothing is learned. If the loss is a "
                "step function, such as an accuracy, raise zo_eps=%g. If it divides a value by its own detached "
                "copy, as policy-gradient losses do, its value never changes; use another loss.",
                STEPS,
                eps,
            )
