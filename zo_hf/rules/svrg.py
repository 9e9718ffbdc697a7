"""Variance reduction by a snapshot and its gradient (MeZO-SVRG, Gautam et al., arXiv 2404.08080, algorithm 2).

A period is N + T steps. In the first N the coordinates stay at the snapshot ξ̃, and every batch has its own
directions:

    g̃ = 1/N Σₛ 1/q Σᵢ c̃ₛᵢ · zₛᵢ                 the last of these steps is ξ ← ξ - η·g̃, the paper's "full batch" step
    ĝ = 1/q Σᵢ (cᵢ - c̃ᵢ) · zᵢ + g̃               in the T steps after it: c at ξ, c̃ at ξ̃, same batch, same direction

The noise that a batch causes equally at both points cancels in ĝ: for ξ = ξ̃, ĝ = g̃ on every batch. The noise of g̃
remains, and T + 1 steps share it.

With a direction for every group of rows, the sums are also over groups, and c and c̃ are those of a group's share.

The paper estimates g̃ from one direction on 512 to 1,024 examples, has a period of q = T + 1 = 2, and uses a larger
step size along g̃. This module uses N batches of the run, each with its own directions, and one learning rate. That
averages the noise of the directions, too. Some of this noise remains at a minimum, even if the N batches are the whole
data set.

Cost: the estimator's forward passes in the first N steps, and twice as many in the T steps after them. A fold must
come at the end of a period, since it replaces the coordinates of g̃ and ξ̃.
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
from zo_hf.method_info import Method
from zo_hf.rng import StreamOf
from zo_hf.rules.options import RuleOptions
from zo_hf.rules.rule import Rule
from zo_hf.subspaces.folded import Folded
from zo_hf.subspaces.subspace import Subspace


class SVRG(Rule):
    """The rule of the module's formulas. State: ξ̃, and the projected gradients from which g̃ is regenerated.

    Raises:
        ValueError: a fold would come within a period.
    """

    name = "svrg"
    about = Method(
        "MeZO-SVRG (2404.08080)",
        forwards="twice as many, except in zo_svrg_batches steps",
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
        assert subspace.coordinate_blocks is not None
        self._blocks = subspace.coordinate_blocks
        length = self.period(self.options)
        if isinstance(subspace, Folded) and subspace.fold_steps % length:
            raise ValueError(
                f"zo_fold_steps={subspace.fold_steps} replaces the coordinates within a period of zo_rule='svrg', which has "
                f"zo_svrg_batches={self.options.svrg_batches} plus zo_svrg_steps={self.options.svrg_steps} steps; use a "
                f"multiple of {length}, or 0."
            )
        self._period = -1
        # c̃ of every step at the snapshot and every direction; NaN for a skipped step.
        self._at_snapshot = torch.full((self.options.svrg_batches, 0), torch.nan, dtype=torch.float64)
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
        last_at_snapshot = self.options.svrg_batches - 1
        here, there = torch.tensor(projected_gradients, dtype=torch.float64).view(2, -1)
        if period != self._period:
            if phase > last_at_snapshot:  # all steps at the snapshot were skipped
                self.subspace.clear_gradient()
                return
            self._period = period
            # Every group of rows may have directions of its own.
            self._at_snapshot = here.new_full((self.options.svrg_batches, len(here)), torch.nan)
            self._take_snapshot()
        if phase <= last_at_snapshot:
            self._at_snapshot[phase], self._anchor = here, None
            if phase < last_at_snapshot:
                self.subspace.clear_gradient()
                return
        anchor = self._gradient_at_snapshot(stream_of, distribution)
        coefficients = self.estimator.coefficients((here - there).tolist())
        self.subspace.write_gradient(coefficients, stream_of, distribution)
        for name, coordinate in self.subspace.coordinates.items():
            assert coordinate.grad is not None
            coordinate.grad.add_(anchor[name])

    def _gradient_at_snapshot(self, stream_of: StreamOf, distribution: Distribution) -> dict[str, Tensor]:
        """Return g̃ by coordinate name; it is kept until the period ends."""
        if self._anchor is None:
            first = self._period * self.period(self.options)
            phases = [i for i, row in enumerate(self._at_snapshot) if not row.isnan().any()]
            coefficients = [
                c / len(phases)
                for phase in phases
                for c in self.estimator.coefficients(self._at_snapshot[phase].tolist())
            ]
            directions = self._at_snapshot.shape[1]
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
        state = {"found": self._at_snapshot.clone(), "period": torch.tensor(self._period)}
        for block in self._blocks:
            assert block.snapshot is not None
            for name in block.coordinates:
                state[f"snapshot/{name}"] = block.layout.view(block.snapshot, name).clone()
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._at_snapshot, self._period, self._anchor = state["found"].clone(), int(state["period"]), None
        for block in self._blocks:
            assert block.snapshot is not None
            for name in block.coordinates:
                block.layout.view(block.snapshot, name).copy_(state[f"snapshot/{name}"])
