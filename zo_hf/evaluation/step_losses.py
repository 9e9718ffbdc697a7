"""The losses of a step's micro-batches at common points, and their mean over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_hf.estimators.probe import Probe
from zo_hf.evaluation.evaluate import ProbeEvaluator
from zo_hf.evaluation.step_randomness import StepRandomness
from zo_hf.parallel.ranks import Ranks
from zo_hf.subspaces.subspace import Subspace


@dataclass(frozen=True)
class WeightedLoss:
    """The loss of a micro-batch.

    Args:
        closure: evaluates it.
        weight: factor of the loss in the step's.
        random: the random numbers of the step.
    """

    closure: Callable[[], Any]
    weight: float | Tensor
    random: StepRandomness


class StepLosses:
    """Evaluates micro-batches at the rank's share of the points.

    Args:
        subspace: perturbs the model.
        evaluator: evaluates a batch, and counts forward passes.
        ranks: the processes that train together.
    """

    def __init__(self, subspace: Subspace, evaluator: ProbeEvaluator, ranks: Ranks) -> None:
        self._subspace, self._evaluator, self._ranks = subspace, evaluator, ranks

    def own(self, batch: WeightedLoss, probes: Sequence[Probe]) -> Tensor:
        """Return the weighted losses at this rank's share of the probes, and count the forward passes of all ranks."""
        own = [probes[i] for i in self._ranks.grid.own(probes)]
        if not own:
            self._evaluator.forward_passes += len(probes)
            device = self._subspace.device
            losses = torch.zeros(0, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        else:
            directions, generators = batch.random.of_directions, batch.random.generators
            losses = self._evaluator.losses(self._subspace, batch.closure, own, *directions, len(probes), generators)
        # A product is a launch.
        return losses * batch.weight if isinstance(batch.weight, Tensor) or batch.weight != 1.0 else losses

    def mean_at(self, batches: Iterable[WeightedLoss], probes: Sequence[Probe]) -> list[float]:
        """Return the losses of all micro-batches together at the probes, the mean of all ranks."""
        own = torch.stack([self.own(batch, probes) for batch in batches]).sum(0)
        return self._ranks.mean_losses(own, probes).tolist()


class LossSum:
    """The sum of losses at the same points over a step's micro-batches.

    Args:
        ranks: the processes that train together.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.of_rank: Tensor | None = None  # at this rank's share of the points, (own points,)

    def add(self, losses: Tensor) -> None:
        """Add the losses of a micro-batch, (own points,)."""
        self.of_rank = losses if self.of_rank is None else self.of_rank + losses

    def discard(self) -> None:
        """Forget the micro-batches."""
        self.of_rank = None

    def gather(self, probes: Sequence[Probe]) -> list[float]:
        """Return the mean of all ranks at each of the points `probes`, and begin anew."""
        assert self.of_rank is not None
        losses = self._ranks.mean_losses(self.of_rank, probes).tolist() if probes else []
        self.discard()
        return losses
