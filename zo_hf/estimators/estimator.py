"""What every estimator is: which losses a step asks for, and the numbers it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from zo_hf.method import Method
from zo_hf.probes.probe import Probe


class Estimator:
    """Turns the losses at a step's probes into projected gradients.

    A subclass is one file; it holds no state, so that a step's numbers depend on its losses alone.

    Args:
        eps: distance ε of a probe along its direction.
        num_directions: q, directions of a step.
    """

    #: The name used in options.
    name: ClassVar[str]
    about: ClassVar[Method]

    def __init__(self, eps: float, num_directions: int = 1) -> None:
        self.eps, self.num_directions = eps, num_directions

    @property
    def numbers(self) -> int:
        """How many numbers `projected_gradients` makes of a step's losses."""
        return self.num_directions

    def probes(self) -> list[Probe]:
        """The evaluations of a step, in a fixed order."""
        raise NotImplementedError

    def projected_gradients(self, losses: Sequence[float]) -> list[float]:
        """cᵢ of every direction from the losses at `probes()`, in its order, and then what else a rule needs of them."""
        raise NotImplementedError

    def coefficients(self, projected_gradients: Sequence[float]) -> list[float]:
        """What each direction is multiplied by in ĝ: the mean over directions, unless a subclass says otherwise.

        projected_gradients: what the method of that name returned, the cᵢ clipped and normalised by now.
        """
        return [c / self.num_directions for c in projected_gradients]
