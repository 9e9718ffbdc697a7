"""A step whose numbers are differentially private: the sums of the rows' clipped numbers, with noise.

    ℓᵢ(ξ ± ε·z_g) of every row i  →  cᵢ  →  Σ_{i in g} clipped cᵢ, of all micro-batches and ranks  →  + noise  →  / B

Nothing else of a step's losses leaves this file: no loss, no count of rows, and no row that was not finite, which counts as 0.
`zo_hf.privacy.mechanism` has the theorem. It needs two things of a loss. Every row has one of its own, with a fixed divisor: a
token's share of the batch's tokens would change with the other rows. And it depends on no other row, which the first
batch shows: while some rows are evaluated far away, the others' losses must stay the same.

Rows draw their group at random, from the secret. A place in the batch would move all later rows to other groups when one
row is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from zo_hf.estimators import Estimator
from zo_hf.estimators.probe import NotBatchable, Probe
from zo_hf.evaluation.evaluate import ProbeEvaluator
from zo_hf.evaluation.first_batch import some_elsewhere, why_not_apart
from zo_hf.evaluation.packed_loss import PackedLoss, packed
from zo_hf.evaluation.precision import rounding
from zo_hf.evaluation.row_losses import RowLosses, model_rows
from zo_hf.evaluation.step_randomness import StepRandomness
from zo_hf.parallel.ranks import Ranks
from zo_hf.privacy import GaussianMechanism, Guarantee, Secret
from zo_hf.rng.global_generators import GlobalGenerators
from zo_hf.subspaces.subspace import Subspace

#: Forward passes of the check that rows are independent, in the first micro-batch.
PASSES_OF_CHECK = 2

_WAY_OUT = "use the model's own loss, or return RowLosses"


@runtime_checkable
class LossOfRows(Protocol):
    """A loss that has one value for every row, with a divisor that no other row changes.

    Attributes:
        rows: rows of the batch.
    """

    rows: int

    def losses_of_rows(self) -> Tensor:
        """Return the loss of every row, (rows,), from one forward pass."""


class PrivateRows:
    """Gathers a step's private numbers.

    Args:
        subspace: perturbs the model.
        evaluator: enters the probes, and counts forward passes.
        ranks: the processes that train together.
        estimator: turns the losses of a row into its numbers.
        mechanism: bounds them, and makes the noise.
        rows_per_direction: expected number of rows in a group; 0 lets all rows share the directions.

    Attributes:
        secret: the key of the noise; it must be the same on all ranks.
        expected_rows: B, number of rows of a step on average, which its sums are divided by; None before it is known.
        part_of: gives the place in the step of a micro-batch's first row, and how many of its rows count, for a step and the
            number of the micro-batch on this rank. None counts all rows, in the order in which they come.
        guarantee: what the run promises; None without a Trainer, where the engine does not know the data.
    """

    def __init__(
        self,
        subspace: Subspace,
        evaluator: ProbeEvaluator,
        ranks: Ranks,
        estimator: Estimator,
        mechanism: GaussianMechanism,
        rows_per_direction: int,
    ) -> None:
        self._subspace, self._evaluator, self._ranks = subspace, evaluator, ranks
        self._estimator, self.mechanism, self._rows_per_direction = estimator, mechanism, rows_per_direction
        self.secret = Secret()
        self.expected_rows: int | None = None
        self.part_of: Callable[[int, int], tuple[int, int]] | None = None
        self.guarantee: Guarantee | None = None
        self._sums: list[int] | None = None
        self._micro_batches, self._rows, self._is_checked = 0, 0, False

    @property
    def groups(self) -> int:
        """Number of groups of a step, each with directions of its own."""
        if not self._rows_per_direction:
            return 1
        return max(1, (self.expected_rows or 1) // self._rows_per_direction)

    @property
    def has_losses(self) -> bool:
        """True if a micro-batch of the present step has been evaluated."""
        return self._sums is not None

    def discard(self) -> None:
        """Forget the micro-batches of the present step."""
        self._sums, self._micro_batches, self._rows = None, 0, 0

    @torch.no_grad()
    def evaluate(
        self,
        closure: Callable[[], Any],
        probes: Sequence[Probe],
        random: StepRandomness,
        step: int,
    ) -> None:
        """Evaluate one micro-batch, and add the bounded numbers of its rows to the step's sums.

        Args:
            closure: the loss, a `LossOfRows` or a function that returns `RowLosses`.
            probes: the estimator's probes.
            random: the random numbers of the step.
            step: number of the step.

        Raises:
            ValueError: the loss has no value for every row, or a row's value depends on others.
        """
        if self.expected_rows is None:
            raise ValueError(
                "zo_dp_noise_multiplier divides by the expected number of rows of a step, which is unknown; set "
                "zo.private.expected_rows, and draw every step's rows by Poisson sampling."
            )
        at = _Batch(self._evaluator, self._subspace, packed(closure), random)
        if not step and not self._micro_batches:
            self._evaluator.forward_passes += PASSES_OF_CHECK
        first, count = (self._rows, at.rows) if self.part_of is None else self.part_of(step, self._micro_batches)
        if not self._is_checked and at.rows > 1:
            self._check_independent(at, probes[-1])
        groups = self.groups
        group_of = [0] * count if groups == 1 else self.secret.groups(step, first + count, groups)[first:]
        group_of += [0] * (at.rows - count)  # rows that only keep a batch from being empty
        losses = [at.losses(self._points(probe, group_of)) for probe in probes]
        self._evaluator.forward_passes += len(probes)
        each = self._estimator.numbers
        sums = [0] * (groups * each) if self._sums is None else self._sums
        for group, *of_row in list(zip(group_of, *(found.tolist() for found in losses), strict=True))[:count]:
            for number, c in enumerate(self.mechanism.bounded(self._estimator.projected_gradients(of_row))):
                sums[group * each + number] += c
        self._sums = sums
        self._micro_batches, self._rows = self._micro_batches + 1, self._rows + at.rows

    def release(self, step: int) -> list[float]:
        """Return the step's numbers, with noise, the same on all ranks; group by group, those of its directions in order.

        Raises:
            ValueError: no row of the step has read some of the parameters that move.
        """
        if self._subspace.still:
            raise ValueError(
                f"zo_dp_noise_multiplier needs steps that read every moving parameter, but the first step did not read "
                f"{min(self._subspace.still)}, and a later step that reads it would reveal something about its rows; freeze it, "
                "or name it in zo_exclude_modules."
            )
        assert self._sums is not None and self.expected_rows is not None
        own = torch.tensor(self._sums, dtype=torch.int64, device=self._subspace.device)
        self.discard()
        sums = self._ranks.all_gather(own).sum(0).tolist()
        noise = self.mechanism.noise(self.secret, step, len(sums))
        noisy = torch.tensor([s + n for s, n in zip(sums, noise, strict=True)], dtype=torch.int64)
        noisy = noisy.to(self._subspace.device)
        self._ranks.broadcast(noisy)  # another machine's logarithm may round differently
        return self.mechanism.mean(noisy.tolist(), self.expected_rows)

    def _points(self, probe: Probe, group_of: Sequence[int]) -> list[Probe]:
        """Return one point for all rows, or one for each."""
        if self.groups == 1 or not probe.scale:
            return [probe]
        q = self._estimator.num_directions
        return [replace(probe, direction=group * q + probe.direction) for group in group_of]

    def _check_independent(self, at: _Batch, probe: Probe) -> None:
        points = [probe] * at.rows
        before = at.random.generators or GlobalGenerators.now(self._subspace.device)
        found = at.losses(points), at.losses(some_elsewhere(points))
        if before.have_moved():
            raise ValueError(
                "zo_dp_noise_multiplier cannot bound what a row does to this loss, because it draws random numbers, and one row "
                "more would give the others different ones; use a model and a loss without them."
            )
        # A row that is not finite by itself is no sign of others.
        alone, others = (losses.nan_to_num(0.0, 0.0, 0.0)[None] for losses in found)
        dtype = self._evaluator.dtype_of_computation(self._subspace, alone.dtype)
        problem = why_not_apart(alone, others, alone, alone.sum(1), rounding(dtype))
        if problem is not None:
            raise ValueError(
                f"zo_dp_noise_multiplier cannot bound what a row does to this loss, because {problem}; use a model and a loss "
                "that evaluate each row by itself."
            )
        self._is_checked = True


class _Batch:
    """The losses of one batch's rows at points of the coordinates; the arguments are those of `PrivateRows.evaluate`.

    Attributes:
        rows: rows of the batch.
        random: the random numbers of the step.
    """

    def __init__(
        self,
        evaluator: ProbeEvaluator,
        subspace: Subspace,
        closure: Any,
        random: StepRandomness,
    ) -> None:
        if isinstance(closure, PackedLoss):
            raise ValueError(
                "zo_dp_noise_multiplier does not take sequences that are packed into rows, because a row of the data decides "
                "what the others share a batch with; use a collator that pads."
            )
        self._evaluator, self._subspace, self._closure, self.random = evaluator, subspace, closure, random
        if isinstance(closure, LossOfRows):
            self.rows, self._model_rows = closure.rows, model_rows(closure)
        else:
            self.rows = self._model_rows = len(self._once())
            evaluator.forward_passes += 1

    def losses(self, points: Sequence[Probe]) -> Tensor:
        """Return the loss of every row, (rows,), in float64 on the CPU; there is one point for all rows, or one for each."""
        rows = self._model_rows // self.rows if len(points) > 1 else 0
        with self._evaluator.at(self._subspace, points, *self.random.of_directions, rows):
            found = self._once()
        if len(found) != self.rows:
            raise ValueError(f"the loss has {len(found)} values for {self.rows} rows; return one for every row.")
        return found.cpu().double()

    def _once(self) -> Tensor:
        self.random.restore()
        try:
            found = self._closure.losses_of_rows() if isinstance(self._closure, LossOfRows) else self._closure()
        except NotBatchable as error:
            raise ValueError(f"zo_dp_noise_multiplier needs a loss for every row, and {error}; {_WAY_OUT}.") from error
        if not isinstance(found, RowLosses):
            raise ValueError(
                f"zo_dp_noise_multiplier needs a loss for every row, and this one is of all rows; {_WAY_OUT}."
            )
        return found.as_subclass(Tensor)
