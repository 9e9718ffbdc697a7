"""What every estimator is: which losses a step asks for, and the numbers it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from zo_hf.method import Method
from zo_hf.probes.probe import Probe


class Estimator:
    """Turns the losses at a step's probes into projected gradients.

    A subclass is one file; it holds no state, so that a step's numbers depend on its losses alone.

    Args:
        eps: distance ε of a probe along its direction.
        num_directions: q, directions of a step.

    Raises:
        ValueError: there are fewer directions than it needs.
    """

    #: The name used in options.
    name: ClassVar[str]
    about: ClassVar[Method]
    #: Fewest directions of a step that it can make something of.
    least_directions: ClassVar[int] = 1
    #: Whether its forward passes carry tangents, which neither probes that share one nor compiled ones can.
    needs_tangents: ClassVar[bool] = False
    #: Whether the losses' scale is divided out of c, which then is no slope that a subspace's default could clip.
    is_scale_free: ClassVar[bool] = False
    #: Whether its directions are unit vectors, one coordinate each, instead of noise.
    along_coordinates: ClassVar[bool] = False

    def __init__(self, eps: float, num_directions: int = 1) -> None:
        if num_directions < self.least_directions:
            raise ValueError(
                f"zo_num_directions={num_directions} is too few for zo_estimator={self.name!r}, which compares the losses of "
                f"a step with one another; use at least {self.least_directions}."
            )
        self.eps, self.num_directions = eps, num_directions

    @classmethod
    def check_model(cls, model: nn.Module) -> None:
        """Refuse a model that its probes cannot be evaluated on.

        Raises:
            ValueError: it is one; the message says what to use instead.
        """

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

    def loss(self, losses: Sequence[float]) -> float:
        """What a step reports as its loss: the mean over the probes, unless one of them is the current point itself."""
        return sum(losses) / len(losses)

    def coefficients(self, projected_gradients: Sequence[float]) -> list[float]:
        """What each direction is multiplied by in ĝ: the mean over directions, unless a subclass says otherwise.

        projected_gradients: what the method of that name returned, the cᵢ clipped and normalised by now.
        """
        return [c / self.num_directions for c in projected_gradients]

    def learning_rate(self, of_the_subspace: float) -> float:
        """The default learning rate, from what suits the subspace where c is a slope."""
        return of_the_subspace
