"""The curvature along a step's own directions, from what the step evaluates anyway and one loss more.

    κᵢ = (L(ξ + ε·zᵢ) + L(ξ - ε·zᵢ) - 2·L(ξ)) / ε²          = zᵢᵀ∇²L zᵢ up to O(ε²)

A two-point step has the outer two and lacks L(ξ); a one-sided step has L(ξ) and lacks the loss on the other side, which is
evaluated for its first direction alone; a second difference lacks nothing. For an optimizer that divides by a diagonal P
the curvature that matters is that of P^-½·H·P^-½, along s·P^-½·z₀ with s such that it is as long as z₀: no probe of the
step lies there, so both sides are evaluated.

What is missing is evaluated after the step's probes, on the same batch and in a forward pass of its own: in one batch with
them it would change the last place of their losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from zo_hf.estimators import Estimator, OneSided, SecondDifference, TwoPoint
from zo_hf.one_thread import one_thread
from zo_hf.probes.probe import Probe
from zo_hf.subspaces.subspace import Subspace

#: The estimators whose probes are at ±ε along directions, and whose c is a slope.
MEASURED = (TwoPoint.name, SecondDifference.name, OneSided.name)

# Of so many steps the curvature is remembered: the Hessian drifts, and a mean over more would lag behind it.
REMEMBERED = 32


class Preconditioner(Protocol):
    """P, the diagonal that an optimizer divides by."""

    def exists(self) -> bool:
        """Whether the optimizer has one yet."""

    def inverse_root(self) -> Mapping[str, Tensor]:
        """P^-½ over every coordinate tensor, by name, positive where a direction moves it."""


def curvature_probes(estimator: Estimator, divides: bool) -> list[Probe]:
    """What a step that is measured evaluates beyond its own probes.

    Args:
        estimator: of the steps.
        divides: whether along directions that a preconditioner scales, where the step has only L(ξ), if anything.
    """
    own = [probe for probe in estimator.probes() if not divides or not probe.scale]
    around = SecondDifference(estimator.eps, measured_directions(estimator, divides))
    return [probe for probe in around.probes() if probe not in own]


def measured_directions(estimator: Estimator, divides: bool) -> int:
    """How many of a step's directions are measured: all, where the step has both sides of them."""
    both_sides = {Probe(i, -estimator.eps) for i in range(estimator.num_directions)} <= set(estimator.probes())
    return estimator.num_directions if both_sides and not divides else 1


class CurvatureProbes:
    """What a step evaluates beside its own probes, and what has been found.

    Args:
        estimator: of the steps.
        every: steps between those that are measured; the first one is.
        preconditioner: of the optimizer; nothing is measured before it exists. None: P = 1.

    Attributes:
        num_directions: how many of a step's directions are measured.
        probes: what a step that is measured evaluates beyond its own.
        curvatures: the last steps' κ, each the mean over the step's directions, the latest last.
        rounding: about the standard deviation that rounding of the losses gives to the latest of them.
        crossed: whether the run has been found beyond its critical learning rate; here, because a checkpoint holds it.
    """

    def __init__(self, estimator: Estimator, every: int, preconditioner: Preconditioner | None = None) -> None:
        self.every, self._preconditioner, self._own = every, preconditioner, estimator.probes()
        divides = preconditioner is not None
        self.num_directions = measured_directions(estimator, divides)
        self.probes = curvature_probes(estimator, divides)
        self._around = SecondDifference(estimator.eps, self.num_directions)
        self.curvatures: list[float] = []
        self.rounding = 0.0
        self.crossed = False
        self._stretch = 1.0

    def due(self, step: int) -> bool:
        """Whether step number `step` is measured."""
        return step % self.every == 0 and (self._preconditioner is None or self._preconditioner.exists())

    @contextmanager
    def along(self, subspace: Subspace) -> Iterator[None]:
        """Inside, directions are as `probes` means them: scaled by the preconditioner, if there is one."""
        if self._preconditioner is None:
            yield
            return
        inverse_root = self._preconditioner.inverse_root()
        assert subspace.materialised is not None
        blocks = subspace.materialised.blocks
        # Every rank, whatever its number of threads, must go the same distance.
        with one_thread():
            square = sum(float(part.double().square().sum()) for part in inverse_root.values())
        self._stretch = (square / subspace.dimension) ** 0.5
        try:
            for block in blocks:
                block.scale = torch.zeros(block.layout.size, dtype=block.dtype, device=block.layout.device)
                for name in block.coordinates:
                    block.layout.view(block.scale, name).copy_(inverse_root[name] / self._stretch)
            yield
        finally:
            for block in blocks:
                block.scale = None

    def record(self, own: Sequence[float], more: Sequence[float], dtype: torch.dtype) -> list[float]:
        """κ of every direction that is measured, of P^-½·H·P^-½ with a preconditioner; kept if finite.

        Args:
            own: losses at the step's probes.
            more: losses at `probes`.
            dtype: what the losses were computed in.
        """
        losses = dict(zip(self._own, own, strict=True)) | dict(zip(self.probes, more, strict=True))
        around, eps = self._around, self._around.eps
        stretch = self._stretch**2
        numbers = around.projected_gradients([losses[probe] for probe in around.probes()])
        curvatures = [curvature * stretch for curvature in around.curvatures(numbers)]
        clean = losses[Probe(0, 0.0)]
        # Two losses beside twice a third, each off by about its last place.
        self.rounding = 6**0.5 * torch.finfo(dtype).eps * abs(clean) / eps**2 * stretch
        mean = sum(curvatures) / len(curvatures)
        if abs(mean) < float("inf"):
            self.curvatures = [*self.curvatures, mean][-REMEMBERED:]
        return curvatures

    def state(self) -> dict[str, object]:
        """Plain numbers that a checkpoint holds."""
        return {"curvatures": list(self.curvatures), "rounding": self.rounding, "crossed": self.crossed}

    def load_state(self, state: Mapping[str, object]) -> None:
        """Continue from what `state` returned."""
        curvatures, rounding = state["curvatures"], state["rounding"]
        assert isinstance(curvatures, list) and isinstance(rounding, float)
        self.curvatures, self.rounding, self.crossed = list(curvatures), rounding, bool(state["crossed"])
