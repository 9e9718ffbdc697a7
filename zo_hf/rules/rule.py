"""The base class of update rules, which turn projected gradients into the gradient that a torch optimizer reads.

    plain:   ĝ = Σᵢ coefficientᵢ · zᵢ

A rule writes its result where the torch optimizer reads it: `.grad` of the coordinates, or the pending list of the
full subspace. So learning rates, schedules, weight decay and clipping work the same for all rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from zo_hf.directions import Distribution
from zo_hf.estimators.estimator import Estimator
from zo_hf.method_info import Method
from zo_hf.rng import StreamOf
from zo_hf.rules.options import RuleOptions
from zo_hf.subspaces.subspace import Subspace


def is_plain_descent(optimizer: Optimizer) -> bool:
    """Return whether a torch optimizer is SGD that minimizes and has no momentum."""
    return isinstance(optimizer, torch.optim.SGD) and not any(
        group["momentum"] or group["maximize"] for group in optimizer.param_groups
    )


class Rule:
    """The plain rule: the estimate itself is the gradient.

    Args:
        subspace: holds the coordinates that move.
        estimator: computes the projected gradients.
        options: see `RuleOptions`.

    Raises:
        ValueError: the rule does not work with this subspace, estimator or option; the message says what to use
            instead.
    """

    #: The rule's name in options.
    name: ClassVar[str] = "none"
    #: Other names of it, such as the paper's.
    aliases: ClassVar[tuple[str, ...]] = ()
    about: ClassVar[Method] = Method("ZO-SGD (2305.17333), or the torch optimizer named by optim")
    #: Fields of `RuleOptions` that the rule reads.
    uses: ClassVar[tuple[str, ...]] = ()
    #: True if the rule works on tensors with a gradient, which the full subspace does not hold.
    needs_tensors: ClassVar[bool] = False
    #: True if the rule moves entries of a tensor that no direction has moved.
    fills_tensors: ClassVar[bool] = False
    #: True if the scale of c has no effect, so that the learning rate is about the length of a step.
    divides_scale_out: ClassVar[bool] = False
    #: Names of the estimators that the rule works with; empty for all.
    needs_estimator: ClassVar[tuple[str, ...]] = ()
    #: Multiples of a plain SGD step after which the rule evaluates the loss of the step's batches again.
    candidates: ClassVar[tuple[float, ...]] = ()
    #: The number of points at which a step records the estimator's numbers: 1 (ξ), or 2 (ξ and a snapshot of it).
    points: ClassVar[int] = 1
    #: Names in `state` that checkpoints of earlier versions lack.
    newer_state: ClassVar[tuple[str, ...]] = ()

    def __init__(self, subspace: Subspace, estimator: Estimator, options: RuleOptions | None = None) -> None:
        self.subspace, self.estimator = subspace, estimator
        self.options = RuleOptions() if options is None else options

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse a torch optimizer that the rule cannot work with.

        Raises:
            ValueError: the message says which to use instead.
        """

    @classmethod
    def period(cls, options: RuleOptions) -> int:
        """Return the number of steps after which the pattern of `looks_back` repeats."""
        return 1

    @classmethod
    def looks_back(cls, step: int, options: RuleOptions) -> bool:
        """Return whether a step's probes are evaluated at the snapshot, too.

        Otherwise, the numbers at ξ are recorded for the snapshot as well.
        """
        return False

    def write_gradient(
        self, projected_gradients: Sequence[float], stream_of: StreamOf, distribution: Distribution
    ) -> None:
        """Write this step's gradient for the torch optimizer; a replay calls this with the recorded numbers.

        Args:
            projected_gradients: the estimator's numbers, with c of every direction clipped and normalized.
            stream_of: the random stream of each direction.
            distribution: the distribution of the directions.
        """
        coefficients = self.estimator.coefficients(projected_gradients)
        self.subspace.write_gradient(coefficients, stream_of, distribution)

    def choose(self, losses: Sequence[float]) -> float:
        """Return the candidate to take, given the losses at `candidates`; the choice is recorded."""
        raise NotImplementedError

    def take(self, candidate: float) -> None:
        """Turn the gradient that `write_gradient` wrote into the step to the chosen candidate."""
        raise NotImplementedError

    def after_fold(self) -> None:
        """Adapt the state to new bases; called after the subspace has drawn them."""

    def logs(self) -> dict[str, float]:
        """Return the `zo/...` entries that the rule adds to a line of the training log."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that later steps depend on, by name, for a checkpoint; none is a view."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore the state that `state` returned."""
