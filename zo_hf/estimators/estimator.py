"""The interface of all estimators: the losses that a step asks for, and the numbers computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from zo_hf.estimators.probe import Probe
from zo_hf.method_info import Method


class Estimator:
    """Turns the losses at a step's probes into projected gradients.

    An estimator holds no state, so that the numbers of a step depend on its losses alone.

    Args:
        eps: distance ε of a probe along its direction.
        num_directions: q, number of directions of a step.

    Raises:
        ValueError: `num_directions` is too small for this estimator.
    """

    #: Name in options.
    name: ClassVar[str]
    #: Other names of it, such as the paper's.
    aliases: ClassVar[tuple[str, ...]] = ()
    about: ClassVar[Method]
    #: Smallest number of directions that the estimator can work with.
    least_directions: ClassVar[int] = 1
    #: True if its forward passes carry tangents: probes then cannot share a pass, and the model cannot be compiled.
    needs_tangents: ClassVar[bool] = False
    #: True if c does not depend on the scale of the losses. Then it is not a slope, and subspaces do not clip it by
    #: default.
    is_scale_free: ClassVar[bool] = False
    #: True if a direction is a unit vector along one coordinate instead of noise.
    along_coordinates: ClassVar[bool] = False

    def __init__(self, eps: float, num_directions: int = 1) -> None:
        if num_directions < self.least_directions:
            raise ValueError(
                f"zo_num_directions={num_directions} is too small for zo_estimator={self.name!r}, which compares the "
                f"losses of a step; use at least {self.least_directions}."
            )
        self.eps, self.num_directions = eps, num_directions

    @classmethod
    def check_model(cls, model: nn.Module) -> None:
        """Refuse a model on which the probes cannot be evaluated.

        Raises:
            ValueError: `model` is such a model; the message says what to use instead.
        """

    @property
    def numbers(self) -> int:
        """Number of values that `projected_gradients` returns for a step."""
        return self.num_directions

    def probes(self) -> list[Probe]:
        """Return the evaluations of a step, in a fixed order."""
        raise NotImplementedError

    def projected_gradients(self, losses: Sequence[float]) -> list[float]:
        """Compute cᵢ of every direction, and after these any other number that a rule needs.

        Args:
            losses: losses at `probes()`, in the same order.
        """
        raise NotImplementedError

    def numbers_of_groups(self, losses: Sequence[Sequence[float]]) -> list[float]:
        """Compute the numbers of a step whose groups of rows have directions of their own.

        Added up over groups, c · z must point along the gradient of the sum of their losses.

        Args:
            losses: losses of every group at `probes()`, (groups, probes).

        Returns:
            c of every direction, group by group, and then, in the same order, any other number of the groups.
        """
        each, q = [self.projected_gradients(group) for group in losses], self.num_directions
        return [c for numbers in each for c in numbers[:q]] + [other for numbers in each for other in numbers[q:]]

    def loss(self, losses: Sequence[float]) -> float:
        """Return the loss that a step reports: the mean over the probes, unless one of them is the current point."""
        return sum(losses) / len(losses)

    def coefficients(self, projected_gradients: Sequence[float]) -> list[float]:
        """Return the factor of each direction in ĝ, which is cᵢ / q unless a subclass says otherwise.

        Args:
            projected_gradients: result of the method with this name, after cᵢ have been clipped and normalized.
        """
        return [c / self.num_directions for c in projected_gradients]

    def learning_rate(self, subspace_default: float) -> float:
        """Return the default learning rate.

        Args:
            subspace_default: default of the subspace, which suits estimators with a slope as c.
        """
        return subspace_default
