"""The curvature along a step's own directions, from the losses that the step evaluates anyway and a few more.

    κᵢ = (L(ξ + ε·zᵢ) + L(ξ - ε·zᵢ) - 2·L(ξ)) / ε²          = zᵢᵀ∇²L zᵢ up to O(ε²)

A two-point step has the two outer losses and lacks L(ξ). A one-sided step has L(ξ) and lacks the loss on the other
side, which is evaluated for its first direction alone. A second difference lacks nothing.

An optimizer that divides by a diagonal P depends on the curvature of P^-½·H·P^-½. It is measured along s·P^-½·z₀,
where s makes this vector as long as z₀. No probe of the step lies there, so both sides are evaluated.

The missing losses are evaluated after the step's probes, on the same batch, in a forward pass of their own. In one
batch with the probes they would change the last digit of the probes' losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from zo_hf.estimators import Estimator, OneSided, SecondDifference, TwoPoint
from zo_hf.estimators.probe import Probe
from zo_hf.rng.single_thread import single_thread
from zo_hf.subspaces.subspace import Subspace

#: The estimators whose probes are at ±ε along directions, and whose projected gradient is a slope.
MEASURED = (TwoPoint.name, SecondDifference.name, OneSided.name)

# Number of measurements that are kept. The Hessian drifts, and a mean over more of them would lag behind it.
REMEMBERED = 32


class Preconditioner(Protocol):
    """The diagonal P that an optimizer divides by."""

    def exists(self) -> bool:
        """Return whether the optimizer has a preconditioner yet."""

    def inverse_root(self) -> Mapping[str, Tensor]:
        """Return P^-½ for every coordinate tensor, by name; positive wherever a direction moves the tensor."""


def curvature_probes(estimator: Estimator, divides: bool) -> list[Probe]:
    """Return the probes that a measured step evaluates beyond its own.

    Args:
        estimator: the estimator of the run's steps.
        divides: True if a preconditioner scales the directions. The step itself then has at most L(ξ) of what is
            needed.
    """
    own = [probe for probe in estimator.probes() if not divides or not probe.scale]
    around = SecondDifference(estimator.eps, measured_directions(estimator, divides))
    return [probe for probe in around.probes() if probe not in own]


def measured_directions(estimator: Estimator, divides: bool) -> int:
    """Return how many directions of a step are measured: all if the step evaluates both sides of each, else one."""
    both_sides = {Probe(i, -estimator.eps) for i in range(estimator.num_directions)} <= set(estimator.probes())
    return estimator.num_directions if both_sides and not divides else 1


class CurvatureProbes:
    """The probes that a measured step adds to its own, and the curvatures measured so far.

    Args:
        estimator: the estimator of the run's steps.
        every: steps from one measured step to the next; step 0 is measured.
        preconditioner: the optimizer's diagonal P; nothing is measured before it exists. None means P = 1.

    Attributes:
        num_directions: how many of a step's directions are measured.
        probes: the probes that a measured step evaluates beyond its own.
        curvatures: κ of the last measured steps, each the mean over the step's directions, the latest one last.
        rounding: approximate standard deviation of the latest κ that comes from rounding of the losses.
        crossed: whether a measurement has put the run beyond its critical learning rate. It is kept here because a
            checkpoint saves this object's state.
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
        """Return whether step number `step` is measured."""
        return step % self.every == 0 and (self._preconditioner is None or self._preconditioner.exists())

    @contextmanager
    def along(self, subspace: Subspace) -> Iterator[None]:
        """Scale directions by the preconditioner, if any, while the context is open; `probes` are meant for it."""
        if self._preconditioner is None:
            yield
            return
        inverse_root = self._preconditioner.inverse_root()
        assert subspace.coordinate_blocks is not None
        blocks = subspace.coordinate_blocks
        # One thread, so that ranks with different numbers of threads compute the same length.
        with single_thread():
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
        """Return κ of every measured direction, and keep their mean if it is finite.

        With a preconditioner, κ is the curvature of P^-½·H·P^-½.

        Args:
            own: losses at the step's own probes.
            more: losses at `probes`.
            dtype: the coarsest dtype in which the model computes the losses.
        """
        losses = dict(zip(self._own, own, strict=True)) | dict(zip(self.probes, more, strict=True))
        around, eps = self._around, self._around.eps
        stretch = self._stretch**2
        numbers = around.projected_gradients([losses[probe] for probe in around.probes()])
        curvatures = [curvature * stretch for curvature in around.curvatures(numbers)]
        clean = losses[Probe(0, 0.0)]
        # The standard deviation of L₊ + L₋ - 2·L₀ is √(1 + 1 + 4) times that of one loss, about its last digit.
        self.rounding = 6**0.5 * torch.finfo(dtype).eps * abs(clean) / eps**2 * stretch
        mean = sum(curvatures) / len(curvatures)
        if abs(mean) < float("inf"):
            self.curvatures = [*self.curvatures, mean][-REMEMBERED:]
        return curvatures

    def state(self) -> dict[str, object]:
        """Return the state as plain numbers, for a checkpoint."""
        return {"curvatures": list(self.curvatures), "rounding": self.rounding, "crossed": self.crossed}

    def load_state(self, state: Mapping[str, object]) -> None:
        """Restore the state that `state` returned."""
        curvatures, rounding = state["curvatures"], state["rounding"]
        assert isinstance(curvatures, list) and isinstance(rounding, float)
        self.curvatures, self.rounding, self.crossed = list(curvatures), rounding, bool(state["crossed"])
