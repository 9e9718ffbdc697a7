"""Between the estimate and the torch optimizer: the rule that turns projected gradients into a gradient.

    plain:   ĝ = Σᵢ coefficientᵢ · zᵢ

A rule leaves its result where the torch optimizer looks (`.grad` of the coordinates, or the pending list of the full
subspace), so learning rates, schedules, weight decay and clipping work the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from zo_hf.directions import Distribution
from zo_hf.estimators.estimator import Estimator
from zo_hf.method import Method
from zo_hf.subspaces.full import Full
from zo_hf.subspaces.subspace import StreamOf, Subspace

AT_FOLD = ("carry", "reset")


@dataclass(frozen=True)
class RuleOptions:
    """What can be set about rules; the options of `ZOConfig` are called the same, with `zo_` in front.

    Args:
        momentum: β of the running mean of estimates; 0 has none.
        momentum_at_fold: "carry" it over a fold, or "reset" it to zero.
        spectral_rank: k, how many singular directions make up a matrix's step; None is half of what it has.
        curvature_rate: s, the weight of one step in the running mean of the curvature.
        cocd_decay: γ, what the remembered differences are multiplied by at every step. Default: the paper's.
        cocd_memory: m, how many differences are remembered; None remembers one for every coordinate.
        svrg_batches: N, batches that the gradient at a snapshot is estimated from, one a step.
        svrg_steps: T, steps after them that use it. Default: the paper's.

    Raises:
        ValueError: a value is not usable; the message names the option.
    """

    momentum: float = 0.0
    momentum_at_fold: str = "carry"
    spectral_rank: int | None = None
    curvature_rate: float = 1e-6
    cocd_decay: float = 0.99
    cocd_memory: int | None = None
    svrg_batches: int = 9
    svrg_steps: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"zo_momentum={self.momentum} must be at least 0 and below 1; use 0 for none.")
        if self.momentum_at_fold not in AT_FOLD:
            raise ValueError(
                f"zo_momentum_at_fold={self.momentum_at_fold!r} is unknown; choose one of {', '.join(AT_FOLD)}."
            )
        if self.spectral_rank is not None and self.spectral_rank < 1:
            raise ValueError(
                f"zo_spectral_rank={self.spectral_rank} must be at least 1; leave it out for half of all."
            )
        if not 0 <= self.curvature_rate < 1:
            raise ValueError(
                f"zo_curvature_rate={self.curvature_rate} must be at least 0 and below 1; 1e-6 is the paper's."
            )
        if not 0 <= self.cocd_decay <= 1:
            raise ValueError(
                f"zo_cocd_decay={self.cocd_decay} must be from 0 (remembers nothing) to 1 (forgets nothing)."
            )
        if self.svrg_batches < 1:
            raise ValueError(f"zo_svrg_batches={self.svrg_batches} must be at least 1; 9 is the default.")
        if self.svrg_steps < 1:
            raise ValueError(f"zo_svrg_steps={self.svrg_steps} must be at least 1, which is the paper's.")


def is_plain_descent(optimizer: Optimizer) -> bool:
    """Whether a torch optimizer is SGD that goes downhill and has no momentum."""
    return isinstance(optimizer, torch.optim.SGD) and not any(
        group["momentum"] or group["maximize"] for group in optimizer.param_groups
    )


class Rule:
    """The plain rule: the estimate itself is the gradient.

    Args:
        subspace: whose coordinates move.
        estimator: makes the projected gradients.
        options: see `RuleOptions`.

    Raises:
        ValueError: the rule does not work with this subspace, estimator or option; the message says what to use instead.
    """

    #: The name used in options.
    name: ClassVar[str] = "none"
    about: ClassVar[Method] = Method("ZO-SGD (2305.17333), or the torch optimizer named by optim")
    #: Fields of `RuleOptions` that it looks at.
    uses: ClassVar[tuple[str, ...]] = ()
    #: Whether it works on tensors with a gradient, which the full subspace does not hold.
    needs_tensors: ClassVar[bool] = False
    #: Whether it moves entries of a tensor that no direction has moved.
    fills_tensors: ClassVar[bool] = False
    #: Whether the scale of c is without effect, so that the learning rate is about the length of a step.
    divides_scale_out: ClassVar[bool] = False
    #: The names of the estimators with whose numbers it works; of all if there are none.
    needs_estimator: ClassVar[tuple[str, ...]] = ()
    #: Multiples of the step of plain SGD after which it looks at the loss of the step's batches once more.
    candidates: ClassVar[tuple[float, ...]] = ()
    #: How many sets of the estimator's numbers a step is recorded as: one at ξ, and a second one at a snapshot of ξ.
    points: ClassVar[int] = 1

    def __init__(self, subspace: Subspace, estimator: Estimator, options: RuleOptions | None = None) -> None:
        self.subspace, self.estimator = subspace, estimator
        self.options = RuleOptions() if options is None else options
        self.check(subspace.name, estimator.name, estimator.num_directions, self.options)

    @classmethod
    def check(cls, subspace: str, estimator: str, num_directions: int, options: RuleOptions) -> None:
        """Refuse what the rule cannot work with, by the names and values that the options have.

        Raises:
            ValueError: the message says what to use instead.
        """
        if cls.needs_tensors and subspace == Full.name:
            raise ValueError(
                f"zo_rule={cls.name!r} does not work with zo_subspace='full'; use zo_subspace='low_rank', whose coordinates "
                "are held apart from the weights."
            )
        if cls.needs_estimator and estimator not in cls.needs_estimator:
            raise ValueError(
                f"zo_rule={cls.name!r} needs numbers that zo_estimator={estimator!r} does not make; use "
                f"zo_estimator={' or '.join(map(repr, cls.needs_estimator))}."
            )
        for option in fields(RuleOptions):
            value = getattr(options, option.name)
            if option.name not in cls.uses and value != option.default:
                raise ValueError(
                    f"zo_{option.name}={value!r} has no effect with zo_rule={cls.name!r}; leave it out, or use a rule "
                    "that it is for."
                )

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse a torch optimizer that the rule cannot work with.

        Raises:
            ValueError: the message says which to use instead.
        """

    def settings(self) -> dict[str, Any]:
        """The options that it looks at, under their own names: a run continues, or is replayed, with the same."""
        return {f"zo_{name}": getattr(self.options, name) for name in self.uses}

    @classmethod
    def period(cls, options: RuleOptions) -> int:
        """Steps after which those that look back come again in the same order."""
        return 1

    @classmethod
    def looks_back(cls, step: int, options: RuleOptions) -> bool:
        """Whether the probes of a step are evaluated at the snapshot, too; where they are not, its numbers are those at ξ."""
        return False

    def write_gradient(
        self, projected_gradients: Sequence[float], stream_of: StreamOf, distribution: Distribution
    ) -> None:
        """Leave the gradient of this step to the torch optimizer; a replay calls it with the recorded numbers.

        projected_gradients: the estimator's numbers, c of every direction clipped and normalised.
        """
        coefficients = self.estimator.coefficients(projected_gradients)
        self.subspace.write_gradient(coefficients, stream_of, distribution)

    def choose(self, losses: Sequence[float]) -> float:
        """The candidate to take, from the losses at `candidates`; a rule with candidates has it recorded."""
        raise NotImplementedError

    def take(self, candidate: float) -> None:
        """Turn the gradient that `write_gradient` left into the step to the chosen candidate."""
        raise NotImplementedError

    def after_fold(self) -> None:
        """To be called when the subspace has drawn new bases."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that the rest of the run depends on, by name, none of them a view; a checkpoint holds them."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned."""
