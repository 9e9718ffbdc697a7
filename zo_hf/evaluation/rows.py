"""A direction for every group of rows: many projected gradients from the same forward passes.

A batch's loss is the sum of its groups' shares, L = Σ_g ℓ_g. The perturbation lives inside the forward, so every group
of rows can have a direction of its own in one forward pass, and gives its own number:

    c_g = [ℓ_g(ξ + ε·z_g) − ℓ_g(ξ − ε·z_g)] / 2ε        ĝ = Σ_g c_g · z_g        E[ĝ] = Σ_g ∇ℓ_g = ∇L

With G groups of a batch of B rows, d coordinates and the gradient noise scale B_s = E‖∇ℓ_row − ∇L‖² / ‖∇L‖²:

    E‖ĝ‖² ≈ d · ‖∇L‖² · (1/G + B_s/B)        G = 1 is MeZO

so a step may be longer by up to (1 + B_s/B) / (1/G + B_s/B). A forward pass with tangents gives c_g = ∇ℓ_g · z_g of all
groups at once, the limit for ε → 0. Groups are numbered by the place of their rows in the step, across micro-batches and
ranks. The estimate therefore does not depend on how a step is divided.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zo_hf.estimators.probe import NotBatchable, Probe
from zo_hf.evaluation import free_memory
from zo_hf.evaluation.derivative import own_passes
from zo_hf.evaluation.evaluate import ProbeEvaluator
from zo_hf.evaluation.first_batch import (
    others_elsewhere,
    passes_of_check,
    passes_of_joined,
    some_elsewhere,
    why_not_apart,
    why_not_joined,
)
from zo_hf.evaluation.group_passes import GroupPasses, directions_of
from zo_hf.evaluation.noise_scale import NoiseScale
from zo_hf.evaluation.packed_loss import PackedLoss, packed
from zo_hf.evaluation.pass_graphs import NotCapturable
from zo_hf.evaluation.precision import rounding
from zo_hf.evaluation.row_losses import GroupedLoss, LossByRows, RowLosses
from zo_hf.evaluation.step_randomness import StepRandomness
from zo_hf.parallel.ranks import Ranks
from zo_hf.reason import reason_of
from zo_hf.subspaces.subspace import Subspace

logger = logging.getLogger(__name__)

#: Directions of a batch with "auto". Every one takes memory of twice the coordinates, and the gain saturates at B_s rows.
MOST_GROUPS = 32
#: Those of the batches of all processes. Each process draws all of them for the update, as if it had evaluated them.
MOST_GROUPS_OF_PROCESSES = 1024
#: Lengths of joined rows that a rank tells the others. A model has one or two.
MOST_LENGTHS = 8


class RowGroups:
    """Evaluates a step's probes with a direction for every group of rows.

    Args:
        subspace: perturbs the model.
        evaluator: counts forward passes, and evaluates batches that do not come apart.
        ranks: the processes that train together.
        rows_per_direction: number of consecutive rows in a group.
        is_auto: True if the user has left the number to the engine. Groups are then larger where a batch would have more
            than `MOST_GROUPS`, or those of all processes more than `MOST_GROUPS_OF_PROCESSES`, and a loss that does not
            come apart is no reason for a warning.
        noise_scale_steps: number of steps between measurements of the noise scale; 0 never measures.

    Attributes:
        is_auto: see above.
        comes_apart: whether the run's loss comes apart by rows; None before the first batch.
        groups_per_batch: number of groups in a micro-batch; None before the first batch.
        count: number of groups in a step of all ranks; None before the end of the first step.
        noise_scale: measures the gradient noise scale.
    """

    def __init__(
        self,
        subspace: Subspace,
        evaluator: ProbeEvaluator,
        ranks: Ranks,
        rows_per_direction: int,
        is_auto: bool = False,
        noise_scale_steps: int = 0,
    ) -> None:
        self._subspace, self._evaluator, self._ranks = subspace, evaluator, ranks
        self._rows_per_direction, self.is_auto = rows_per_direction, is_auto
        self.comes_apart: bool | None = None
        self.groups_per_batch: int | None = None
        self.count: int | None = None
        self.noise_scale = NoiseScale(noise_scale_steps)
        self._parts: list[Tensor] = []
        self._batch = 0  # number of the present micro-batch in the step
        self._micro_batches: int | None = None
        self._rows_per_group = 1.0
        self._rows: int | None = None
        self._packs = False  # whether the first batch has had several sequences in a row
        self._has_told = False  # that a batch has not come apart

    def state(self) -> list[Any]:
        """Return the choices of the first step as plain numbers, for a checkpoint."""
        joined = sorted(self._subspace.joined_lengths)
        return [
            self.comes_apart,
            self.groups_per_batch,
            self.count,
            self.noise_scale.state(),
            self._rows,
            self._packs,
            joined,
        ]

    def load_state(self, state: Sequence[Any]) -> None:
        """Restore the choices that `state` returned; the size of a batch may have changed since."""
        self.comes_apart, groups, count, sums, self._rows, *more = state
        self._packs = bool(more and more[0])
        self._subspace.joined_lengths = set(more[1] if len(more) > 1 else ())
        if self._micro_batches is None or self._packs:
            self.groups_per_batch, self.count = groups, count
        self.noise_scale.load_state(sums)

    def expect(self, rows: int, micro_batches: int | None = None) -> None:
        """Number directions for micro-batches of `rows` rows, whatever the first one has.

        Args:
            rows: rows of a micro-batch.
            micro_batches: micro-batches of a step. If a step has more, they share the directions of its first ones.
        """
        rows_per_direction = "auto" if self.is_auto else self._rows_per_direction
        data = self._ranks.grid.data
        self.groups_per_batch = groups_of(rows, rows_per_direction, data, equal=not self._packs)
        self._micro_batches = micro_batches
        if micro_batches is not None:
            self.count = self.groups_per_batch * micro_batches * data

    def logs(self) -> dict[str, float]:
        """Return the entry of the training log."""
        scale = self.noise_scale.value(self._rows_per_group)
        return {} if scale is None else {"zo/noise_scale": scale}

    @property
    def has_losses(self) -> bool:
        """True if a micro-batch of the present step has been evaluated by groups."""
        return bool(self._parts)

    def discard(self) -> None:
        """Forget the micro-batches of the present step."""
        self._parts, self._batch = [], 0

    @torch.no_grad()
    def evaluate(
        self,
        closure: Callable[[], Any],
        probes: Sequence[Probe],
        random: StepRandomness,
        weight: float | Tensor,
    ) -> Tensor | None:
        """Evaluate one micro-batch, and keep the losses for `gather`.

        Args:
            closure: the loss.
            probes: the estimator's probes for one group.
            random: the random numbers of the step.
            weight: factor of the loss.

        Returns:
            The loss of the micro-batch at each of the probes, (probes,); None if the run's loss does not come apart.
        """
        self._batch = len(self._parts)
        losses = self._by_groups_or_together(closure, probes, random)
        if losses is None:
            return None
        assert self.groups_per_batch is not None
        losses = losses * weight
        self._parts.append(torch.nn.functional.pad(losses, (0, self.groups_per_batch - losses.shape[1])))
        return losses.sum(1)

    @torch.no_grad()
    def evaluate_more(
        self,
        closure: Callable[[], Any],
        probes: Sequence[Probe],
        random: StepRandomness,
        weight: float | Tensor,
    ) -> Tensor:
        """Return the loss of the micro-batch that `evaluate` has had at more probes of its groups, (probes,).

        The arguments are those of `evaluate`. `gather` does not return these losses.
        """
        if not probes:
            return torch.zeros(0, device=self._subspace.device)
        losses = self._by_groups_or_together(closure, probes, random)
        assert losses is not None
        return (losses * weight).sum(1)

    def _by_groups_or_together(
        self,
        closure: Callable[[], Any],
        probes: Sequence[Probe],
        random: StepRandomness,
    ) -> Tensor | None:
        """Return the losses of the groups, (probes, groups), with one group if the batch stays whole.

        None means that the run's loss does not come apart.
        """
        losses = self._apart(closure, probes, random)
        if not self.comes_apart or losses is not None:
            return losses if self.comes_apart else None
        first = self._first_group() * directions_of(probes)
        together = [replace(probe, direction=first + probe.direction) for probe in probes]
        count, generators = len(probes), random.generators
        losses = self._evaluator.losses(self._subspace, closure, together, *random.of_directions, count, generators)
        return losses[:, None]

    @torch.no_grad()
    def decide(
        self,
        closure: Callable[[], Any],
        probe: Probe,
        random: StepRandomness,
    ) -> bool:
        """Find out before the first step, in four forward passes, whether the run's loss comes apart by rows.

        Args:
            closure: the loss of a batch.
            probe: a point away from the present one.
            random: the random numbers of the step.
        """
        if self.comes_apart is None:
            self._apart(closure, (probe,), random)
        return bool(self.comes_apart)

    def in_step(self, micro_batches: int) -> int:
        """Return the number of groups in a step of all ranks; `comes_apart` must be True.

        Args:
            micro_batches: micro-batches of a step, if `expect` has not been told.
        """
        assert self.groups_per_batch is not None
        return self.count or self.groups_per_batch * micro_batches * self._ranks.grid.data

    def gather(self) -> list[list[float]]:
        """Return the losses of the step's groups at each of the probes, of all micro-batches and ranks in order."""
        limit = self._micro_batches or len(self._parts)
        parts = torch.stack(self._parts[:limit])  # (micro-batches, probes, groups)
        for number, more in enumerate(self._parts[limit:]):
            parts[number % limit] += more
        self.discard()
        grid = self._ranks.grid
        everywhere = grid.of_last_stages(self._ranks.all_gather(parts)) / grid.data  # (data, micro-batches, ...)
        losses = everywhere.permute(1, 0, 3, 2).flatten(0, 2).tolist()
        if self.count is None:
            self.count = len(losses)
        # A step of fewer micro-batches leaves its last directions alone, as if they had found no slope.
        return losses + [[0.0] * len(losses[0])] * (self.count - len(losses))

    def _apart(
        self,
        closure: Callable[[], Any],
        probes: Sequence[Probe],
        random: StepRandomness,
    ) -> Tensor | None:
        """Return the losses of the groups at each of the probes, (probes, groups); None if the batch stays whole."""
        if self.comes_apart is False:
            return None
        loss = packed(self._with_rows(closure, random))
        if self.comes_apart is None:
            self._expect_sequences(loss)
        if not isinstance(loss, GroupedLoss):
            if self.comes_apart is None:
                self._decide("the loss is neither the model's own nor RowLosses")
            return None
        losses = self._tried(loss, probes, random)
        if losses is None and self.comes_apart and isinstance(loss, LossByRows) and self._micro_batches is None:
            again = self._with_rows(loss.closure, random, looks=True)
            if isinstance(again, LossByRows) and again.rows != loss.rows:
                losses = self._tried(again, probes, random)
        return losses

    def _expect_sequences(self, loss: Any) -> None:
        """Number directions for as many packed sequences as the first batch of any rank has, if it has some."""
        own = loss.rows if isinstance(loss, PackedLoss) else 0
        most = int(self._ranks.all_gather(torch.tensor(own, device=self._subspace.device)).max())
        if most:
            self._packs = True
            self.expect(most, self._micro_batches)

    def _with_rows(self, closure: Any, random: StepRandomness, looks: bool = False) -> Callable[[], Any]:
        """Return a closure of `RowLosses` as a loss that comes apart, and any other closure as it is.

        One evaluation shows which it is, and the number of rows. A caller that knows its batches, see `expect`, says so
        itself.

        Args:
            closure: the loss.
            random: the random numbers of the step.
            looks: True if the rows may be others than before.
        """
        if isinstance(closure, GroupedLoss) or self._micro_batches is not None:
            return closure
        if self._rows is None or looks:
            with self._evaluator.leaving_model(self._subspace):
                loss = closure()
            self._evaluator.forward_passes += 1
            self._rows = len(loss) if isinstance(loss, RowLosses) else None
            random.restore()
        return closure if self._rows is None else LossByRows(closure, self._rows)

    def _tried(self, closure: GroupedLoss, probes: Sequence[Probe], random: StepRandomness) -> Tensor | None:
        """Return what `_by_groups` returns, or None if the batch does not come apart."""
        before = self._evaluator.forward_passes
        try:
            return self._by_groups(closure, probes, random)
        except NotCapturable:
            raise
        except Exception as error:  # another kind of batch, or out of memory
            if self._evaluator.recover is not None:  # other processes may be in the middle of the same forward pass
                if self.comes_apart is not None or not isinstance(error, NotBatchable):
                    raise
                self._evaluator.recover()
            self._evaluator.forward_passes = before  # as on ranks whose batch came apart: all rows together count
            if self.comes_apart is None:
                self._decide(reason_of(error))
            elif not self._has_told:
                self._has_told = True
                self._tell("all rows of a batch like this share its directions", reason_of(error))
            logger.debug("a batch does not come apart by rows: %s", error)
        return None

    def _by_groups(
        self,
        closure: GroupedLoss,
        probes: Sequence[Probe],
        random: StepRandomness,
    ) -> Tensor:
        """Return the losses of the groups at each of the probes, (probes, groups); the first batch decides `comes_apart`."""
        if self.groups_per_batch is None:
            self.expect(closure.rows)
        assert self.groups_per_batch is not None
        equal = not isinstance(closure, PackedLoss)
        groups = _divisor(closure.rows, self._rows_per_direction, self.groups_per_batch, equal)
        self._rows_per_group = closure.rows / groups
        evaluator = self._evaluator
        passes = GroupPasses(evaluator, self._subspace, closure, probes, groups, self._first_group(), random)
        if self.comes_apart is None and evaluator.batched and passes.why_not_batchable is not None:
            raise NotBatchable(passes.why_not_batchable)
        own, whole = own_passes(probes), None
        # A rank alone can take more passes for the comparison only if no other waits in them.
        self._subspace.compares_rows = self.comes_apart is None and evaluator.recover is None
        if self.comes_apart is None:  # before any group, so that all ranks have settled how to call their loss
            whole = passes.whole(passes.points(own[-1])[-1])
        chooses, shares_pass = self.may_choose and len(own) > 1, len(own) == len(probes) > 1
        if chooses:
            free_memory.watch(self._subspace.device)
        in_one_batch = self.comes_apart and evaluator.batched and shares_pass
        found = evaluator.in_one_batch(passes) if in_one_batch else passes.sequential()
        evaluator.forward_passes += len(probes)
        if whole is not None:
            self._decide(self._why_not_by_groups(passes, probes, found, whole))
            if self.comes_apart and evaluator.batched and shares_pass:  # so that a refusal comes before the first step
                found = evaluator.in_one_batch(passes)
                evaluator.forward_passes += len(probes)
        if chooses and self.comes_apart:
            found = evaluator.choose(passes, found, len(probes))
        evaluator.dtype = found.dtype
        return found.double()

    def _why_not_by_groups(
        self, passes: GroupPasses, probes: Sequence[Probe], found: Tensor, whole: Tensor
    ) -> str | None:
        """Return why the first batch's loss does not come apart into the shares of groups; None if it does.

        Args:
            passes: the forward passes of the batch.
            probes: the estimator's probes for one group.
            found: the shares at each of the probes, (probes, groups).
            whole: the loss of the batch at the last point of the last group, from a pass over all rows, (1,) or (2,).
        """
        last, evaluator = passes.points(own_passes(probes)[-1]), self._evaluator
        others, alone = passes.shares(some_elsewhere(last)), passes.shares(last[-1:])
        evaluator.forward_passes += passes_of_check(probes)
        error = rounding(evaluator.dtype_of_computation(self._subspace, alone.dtype))
        shares = found[-len(alone) :]
        problem = why_not_apart(shares, others, alone, whole, error)
        if problem is None and self._subspace.joined_lengths:
            moved = [passes.shares(others_elsewhere(last, kept)) for kept in (0, 1)]
            evaluator.forward_passes += passes_of_joined(probes)
            problem = why_not_joined(shares, moved, error)
        return problem

    @property
    def may_choose(self) -> bool:
        """True if the next batch that comes apart is evaluated in one forward pass, too, to see whether that works.

        Where processes make a forward pass together, a CPU evaluates one sign after another: a pipeline streams them.
        """
        together = self._evaluator.recover is not None
        return self._evaluator.batched is None and (free_memory.can_say(self._subspace.device) or not together)

    def looks_again(self, probes: Sequence[Probe]) -> bool:
        """Return whether the next batch that comes apart is evaluated in one forward pass, too: to choose, or to refuse."""
        own = len(own_passes(probes))
        must = self.comes_apart is None and self._evaluator.batched is True and own == len(probes)
        return own > 1 and (self.may_choose or must)

    def _first_group(self) -> int:
        """Return the number of this micro-batch's first group in the step."""
        assert self.groups_per_batch is not None
        number = self._batch % self._micro_batches if self._micro_batches else self._batch
        return (number * self._ranks.grid.data + self._ranks.grid.data_index) * self.groups_per_batch

    def _decide(self, problem: str | None) -> None:
        """Keep the choice, which is for all processes, and give the reason if the loss does not come apart."""
        device = self._subspace.device
        self.comes_apart = self._ranks.all_reduce_and(torch.tensor(problem is None, device=device))
        # A rank whose first batch failed has counted fewer passes, and all ranks must end at the same step.
        joined = sorted(self._subspace.joined_lengths)[:MOST_LENGTHS]
        numbers = [self._evaluator.forward_passes, *joined, *[0] * (MOST_LENGTHS - len(joined))]
        everywhere = self._ranks.all_gather(torch.tensor(numbers, device=device))
        self._evaluator.forward_passes = int(everywhere[:, 0].max())
        self._subspace.compares_rows, self._subspace.joined_lengths = False, set(everywhere[:, 1:].flatten().tolist())
        if not self.comes_apart:
            reason = problem or "the loss of another process does not come apart by rows"
            self._tell("all rows of a step share its directions", reason)

    def _tell(self, consequence: str, reason: str) -> None:
        logger.log(logging.INFO if self.is_auto else logging.WARNING, "%s: %s", consequence, reason)


def groups_of(rows: int, rows_per_direction: int | str, batches: int = 1, equal: bool = True) -> int:
    """Return the number of groups of a batch.

    Args:
        rows: rows of the batch.
        rows_per_direction: the setting.
        batches: number of batches that processes evaluate at the same time.
        equal: False if the sizes of groups may differ.
    """
    if rows_per_direction == "auto":
        return _divisor(rows, 1, max(1, min(MOST_GROUPS, MOST_GROUPS_OF_PROCESSES // batches)), equal)
    return _divisor(rows, int(rows_per_direction), rows, equal) if rows_per_direction else 1


def _divisor(rows: int, rows_per_direction: int, most: int, equal: bool = True) -> int:
    """Return the number of groups: the largest that divides `rows` with groups that are large enough.

    Args:
        rows: rows of the batch.
        rows_per_direction: smallest size of a group; a smaller batch is one group.
        most: largest number of groups.
        equal: False if groups may differ by a row, so that the number need not divide `rows`.
    """
    largest = max(1, min(rows // max(1, rows_per_direction), most))
    return largest if not equal else next(groups for groups in range(largest, 0, -1) if rows % groups == 0)
