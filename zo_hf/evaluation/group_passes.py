"""The shares of the groups of a batch at the probes of a step, in one forward pass for each probe or in one for all.

one after another    x = [g₁ … g_G]                      all groups at +ε·z_g, then all at −ε·z_g
in one batch         x = [g₁ … g_G, g₁ … g_G]            both signs, with the batch twice

The second has half the kernels to launch, and needs the activations of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from zo_hf.estimators.probe import NotBatchable, Probe
from zo_hf.evaluation.derivative import loss_and_derivative, own_passes
from zo_hf.evaluation.evaluate import ProbeEvaluator, check_draws_nothing, one_number
from zo_hf.evaluation.packed_loss import PackedLoss
from zo_hf.evaluation.passed_on import loss_or_zeros
from zo_hf.evaluation.row_losses import GroupedLoss, model_rows
from zo_hf.evaluation.step_randomness import StepRandomness
from zo_hf.subspaces.subspace import Subspace


@runtime_checkable
class BatchableByGroups(Protocol):
    """A loss whose groups can also be evaluated at several probes in one forward pass."""

    def batched_by_groups(self, groups: int, copies: int) -> Tensor:
        """Return the shares of the groups in each of `copies` copies of the batch, (copies, groups)."""


class GroupPasses:
    """Evaluates the groups of one batch, each along directions of its own.

    Args:
        evaluator: enters the probes.
        subspace: perturbs the model.
        closure: the loss of the batch.
        probes: the estimator's probes for one group.
        groups: the number of groups in the batch.
        first: the number of the batch's first group in the step.
        random: the random numbers of the step.
    """

    def __init__(
        self,
        evaluator: ProbeEvaluator,
        subspace: Subspace,
        closure: GroupedLoss,
        probes: Sequence[Probe],
        groups: int,
        first: int,
        random: StepRandomness,
    ) -> None:
        self._evaluator, self.subspace, self._closure, self._random = evaluator, subspace, closure, random
        self._probes, self._groups, self._first = probes, groups, first
        self.generators = random.generators
        self._packing = closure.packing(groups) if isinstance(closure, PackedLoss) and groups > 1 else None
        self.device = subspace.device

    def points(self, probe: Probe) -> list[Probe]:
        """Return the point of every group at a probe."""
        directions = directions_of(self._probes)
        return [
            replace(probe, direction=(self._first + group) * directions + probe.direction)
            for group in range(self._groups)
        ]

    def shares(self, at: Sequence[Probe]) -> Tensor:
        """Return the shares of the groups at their points, (1, groups), or with derivatives below, (2, groups).

        Args:
            at: a point for every group, or one for all of them.
        """
        return self._losses(at, lambda: self._or_zeros(lambda: self._closure.by_groups(self._groups), (self._groups,)))

    def whole(self, point: Probe) -> Tensor:
        """Return the loss of the batch at one point, (1,), with its derivative below if the point asks for it, (2,)."""
        return self._losses([point], lambda: self._or_zeros(lambda: one_number(self._closure(), self.device), ()))

    def sequential(self) -> Tensor:
        """Return the shares at each of the probes, (probes, groups), from one forward pass for each."""
        found = []
        passes = own_passes(self._probes)
        for more, probe in zip(reversed(range(len(passes))), passes, strict=True):
            self._evaluator.expect(more)
            points = self.points(probe)
            found.append(self.shares(points if probe.scale or probe.derivative else points[:1]))
        return torch.cat(found)

    @property
    def why_not_batchable(self) -> str | None:
        """Why one forward pass cannot have all probes, as far as the loss tells; None if it may."""
        if isinstance(self._closure, PackedLoss):
            return "sequences with directions of their own are packed into its rows"
        return None if isinstance(self._closure, BatchableByGroups) else "the loss is not the model's own"

    def batched(self) -> Tensor:
        """Return the shares at each of the probes, (probes, groups), from one forward pass over as many copies of the batch.

        Raises:
            NotBatchable: the model or the loss cannot do it, or the loss has drawn random numbers.
        """
        if not isinstance(self._closure, BatchableByGroups):
            raise NotBatchable(self.why_not_batchable)
        self._random.restore()
        points = [point for probe in self._probes for point in self.points(probe)]
        rows, parts = self._closure.rows // self._groups, (self._groups, len(self._probes))
        with self._evaluator.at(self.subspace, points, *self._random.of_directions, rows):
            shares = self._or_zeros(
                lambda: self._evaluator.in_one_pass(self._closure, parts, lambda loss: loss.batched_by_groups(*parts)),
                parts[::-1],
            )
        check_draws_nothing(self.generators)
        return shares

    def _or_zeros(self, loss: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        return loss_or_zeros(loss, shape, self._evaluator.dtype, self.device)

    def _losses(self, at: Sequence[Probe], loss: Callable[[], Any]) -> Tensor:
        self._random.restore()
        rows = 1 if self._packing is not None else model_rows(self._closure) // len(at)
        packing = self._packing if len(at) > 1 else None
        with self._evaluator.at(self.subspace, at, *self._random.of_directions, rows, packing):
            return loss_and_derivative(loss) if at[0].derivative else loss().detach()[None]


def directions_of(probes: Sequence[Probe]) -> int:
    """Return the number of directions of a group."""
    return 1 + max(probe.direction for probe in probes)
