"""Variance reduction by a snapshot and the gradient there (MeZO-SVRG, Gautam et al., arXiv 2404.08080, algorithm 2).

A period is N + T steps. In the first N the coordinates rest at the snapshot ξ̃, and every batch has its own directions:

    g̃ = 1/N Σₛ 1/q Σᵢ c̃ₛᵢ · zₛᵢ                 the last of these steps is ξ ← ξ - η·g̃, the paper's "full batch" step
    ĝ = 1/q Σᵢ (cᵢ - c̃ᵢ) · zᵢ + g̃               in the T steps after it: c at ξ, c̃ at ξ̃, same batch, same direction

What a batch has in common at both points drops out of ĝ: with ξ = ξ̃ it is g̃, whatever the batch. What is left is the noise
of g̃, which T + 1 steps share. The paper's g̃ is one direction on its 512 to 1,024 examples, its period q = T + 1 = 2, and it
steps longer along g̃ than else. Here batches are those of the run, N of them with directions of their own, which averages
their noise too, but leaves some at a minimum even if the N batches are all there are; and there is one learning rate.

Cost: the estimator's forward passes in the first N steps, twice as many in the T steps after them. A fold has to come at
the end of a period, since g̃ and ξ̃ are in the coordinates that it replaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from zo_hf.directions import Distribution
from zo_hf.estimators.estimator import Estimator
from zo_hf.estimators.forward_gradient import ForwardGradient
from zo_hf.estimators.one_sided import OneSided
from zo_hf.estimators.two_point import TwoPoint
from zo_hf.method import Method
from zo_hf.optimizers.rule import Rule, RuleOptions
from zo_hf.subspaces.folded import Folded
from zo_hf.subspaces.subspace import StreamOf, Subspace


class SVRG(Rule):
    """State: ξ̃, and the numbers that g̃ is made of, from which it is drawn again.

    Raises:
        ValueError: a fold would come within a period.
    """

    name = "svrg"
    about = Method(
        "MeZO-SVRG (2404.08080)",
        forwards="twice as many, but for zo_svrg_batches steps",
        memory="2d",
        needs="zo_fold_steps a multiple of a period",
    )
    uses = ("svrg_batches", "svrg_steps")
    needs_tensors = True
    fills_tensors = True
    needs_estimator = (TwoPoint.name, OneSided.name, ForwardGradient.name)
    points = 2

    def __init__(self, subspace: Subspace, estimator: Estimator, options: RuleOptions | None = None) -> None:
        super().__init__(subspace, estimator, options)
        assert subspace.materialised is not None
        self._blocks = subspace.materialised.blocks
        length = self.period(self.options)
        if isinstance(subspace, Folded) and subspace.fold_steps % length:
            raise ValueError(
                f"zo_fold_steps={subspace.fold_steps} replaces the coordinates within a period of zo_rule='svrg', which is "
                f"zo_svrg_batches={self.options.svrg_batches} and zo_svrg_steps={self.options.svrg_steps} together; use a "
                f"multiple of {length}, or 0."
            )
        self._period = -1
        # c̃ of every step at the snapshot and every direction; not a number where a step was skipped.
        self._found = torch.full((self.options.svrg_batches, estimator.num_directions), torch.nan, dtype=torch.float64)
        self._anchor: dict[str, Tensor] | None = None
        self._take_snapshot()

    @classmethod
    def period(cls, options: RuleOptions) -> int:
        return options.svrg_batches + options.svrg_steps

    @classmethod
    def looks_back(cls, step: int, options: RuleOptions) -> bool:
        return step % cls.period(options) >= options.svrg_batches

    def write_gradient(
        self, projected_gradients: Sequence[float], stream_of: StreamOf, distribution: Distribution
    ) -> None:
        period, phase = divmod(stream_of(0).step, self.period(self.options))
        rests = self.options.svrg_batches - 1
        here, there = torch.tensor(projected_gradients, dtype=torch.float64).view(2, -1)
        if period != self._period:
            if phase > rests:  # all steps at the snapshot were skipped
                self.subspace.clear_gradient()
                return
            self._period = period
            self._found.fill_(torch.nan)
            self._take_snapshot()
        if phase <= rests:
            self._found[phase], self._anchor = here, None
            if phase < rests:
                self.subspace.clear_gradient()
                return
        anchor = self._gradient_at_snapshot(stream_of, distribution)
        coefficients = self.estimator.coefficients((here - there).tolist())
        self.subspace.write_gradient(coefficients, stream_of, distribution)
        for name, coordinate in self.subspace.coordinates.items():
            assert coordinate.grad is not None
            coordinate.grad.add_(anchor[name])

    def _gradient_at_snapshot(self, stream_of: StreamOf, distribution: Distribution) -> dict[str, Tensor]:
        """g̃, by the names of the coordinates; kept until the period ends."""
        if self._anchor is None:
            first = self._period * self.period(self.options)
            phases = [i for i, row in enumerate(self._found) if not row.isnan().any()]
            coefficients = [
                c / len(phases) for phase in phases for c in self.estimator.coefficients(self._found[phase].tolist())
            ]
            directions = self.estimator.num_directions
            self.subspace.write_gradient(
                coefficients,
                lambda i: replace(stream_of(i % directions), step=first + phases[i // directions]),
                distribution,
            )
            grads = {name: coordinate.grad for name, coordinate in self.subspace.coordinates.items()}
            self._anchor = {name: grad for name, grad in grads.items() if grad is not None}
        return self._anchor

    def _take_snapshot(self) -> None:
        for block in self._blocks:
            block.take_snapshot()

    def state(self) -> dict[str, Tensor]:
        state = {"found": self._found.clone(), "period": torch.tensor(self._period)}
        for block in self._blocks:
            assert block.snapshot is not None
            for name in block.coordinates:
                state[f"snapshot/{name}"] = block.layout.view(block.snapshot, name).clone()
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._found, self._period, self._anchor = state["found"].clone(), int(state["period"]), None
        for block in self._blocks:
            assert block.snapshot is not None
            for name in block.coordinates:
                block.layout.view(block.snapshot, name).copy_(state[f"snapshot/{name}"])
