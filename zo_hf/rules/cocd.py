"""Coherent coordinate descent (CoCD, arXiv 2605.14373, equations 2 to 7): differences are kept and reused.

    G ← γ · G                             the measurements of earlier steps decay
    G[k] ← cᵢ     for the B coordinates of this step, all measured at the same point on the same batch
    ξ ← ξ - α · G                         every remembered coordinate moves, by the torch optimizer: .grad = G

γ = 0 is block cyclic coordinate descent; γ = 1 keeps old entries undiminished. With memory for m < n numbers, a ring
holds the m most recent differences. α is the optimizer's learning rate. On a quadratic, CoCD converges for

    α < 2 / (λmax · Σ_{k<K} γᵏ)           K = n/B steps a cycle

This bound is exact for a diagonal Hessian, and was sufficient for every other Hessian tried (docs/cocd.md).

With memory for all n coordinates, the log has the coherence of remembered and new differences (`coherence.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from zo_hf.directions import Distribution, UnitVectors
from zo_hf.estimators.coordinate import Coordinate, CoordinateForward
from zo_hf.estimators.estimator import Estimator
from zo_hf.method_info import Method
from zo_hf.rng import StreamOf
from zo_hf.rules.coherence import Coherence
from zo_hf.rules.options import RuleOptions
from zo_hf.rules.rule import Rule, is_plain_descent
from zo_hf.subspaces.subspace import Subspace


class CoherentCoordinateDescent(Rule):
    """The rule of the module's formulas. State: the remembered differences G, as a ring over coordinate turns.

    Raises:
        ValueError: the estimator measures no coordinates, or an option is out of its range.
    """

    name = "cocd"
    about = Method("CoCD (2605.14373)", memory="d", needs="zo_estimator=coordinate")
    uses = ("cocd_decay", "cocd_memory")
    needs_estimator = (Coordinate.name, CoordinateForward.name)
    newer_state = ("coherence",)

    def __init__(self, subspace: Subspace, estimator: Estimator, options: RuleOptions | None = None) -> None:
        super().__init__(subspace, estimator, options)
        per_step, dimension, memory = estimator.num_directions, subspace.dimension, self.options.cocd_memory
        if memory is not None and not per_step <= memory <= dimension:
            raise ValueError(
                f"zo_cocd_memory={memory} must be between zo_num_directions={per_step} and the number of coordinates, "
                f"{dimension}; leave it out to remember all of them."
            )
        coordinates = list(subspace.coordinates.values())
        is_double = any(coordinate.dtype == torch.float64 for coordinate in coordinates)
        # Turn t of `UnitVectors` is stored at index t mod m, so a new turn always overwrites the oldest one.
        self._ring = torch.zeros(
            dimension if memory is None else memory,
            dtype=torch.float64 if is_double else torch.float32,
            device=coordinates[0].device,
        )
        self._next_step = 0
        decay, remembers_all = self.options.cocd_decay, len(self._ring) == dimension
        self._coherence = Coherence(dimension, per_step, decay, self._ring) if remembers_all else None

    def check_optimizer(self, optimizer: Optimizer) -> None:
        if not is_plain_descent(optimizer):
            raise ValueError(
                f"zo_rule='cocd' keeps its own memory of past steps, which {type(optimizer).__name__} would average again; "
                "use optim='sgd' without momentum, or zo_rule='none'."
            )

    def write_gradient(
        self, projected_gradients: Sequence[float], stream_of: StreamOf, distribution: Distribution
    ) -> None:
        assert isinstance(distribution, UnitVectors)
        ring, step, per_step = self._ring, stream_of(0).step, distribution.per_step
        turn, after = step * per_step, (step + 1) * per_step
        turns = torch.arange(turn, after, device=ring.device)
        # A skipped step measured nothing: its coordinates do not move until their next turn.
        if step >= self._next_step:  # otherwise this step is estimated again, and its numbers replace the earlier ones
            if self._coherence is not None:
                self._coherence.before(step, ring[turns % len(ring)])
            missed = torch.arange(max(self._next_step * per_step, turn - len(ring)), turn, device=ring.device)
            ring.mul_(self.options.cocd_decay)
            ring[missed % len(ring)] = 0.0
            self._next_step = step + 1
        found = self.estimator.coefficients(projected_gradients)
        measured = torch.tensor(found, dtype=ring.dtype, device=ring.device)
        ring[turns % len(ring)] = measured
        if self._coherence is not None:
            self._coherence.after(step, measured)
        self._set_gradient(after, distribution)

    def _set_gradient(self, after: int, units: UnitVectors) -> None:
        """Write the differences remembered after `after` turns into `.grad`; differences of turns before 0 are zero."""
        ring = self._ring
        turns = torch.arange(after - len(ring), after, device=ring.device)
        gradient = ring.new_zeros(units.dimension)
        gradient[units.order.to(ring.device)[turns % units.dimension]] = ring[turns % len(ring)]
        coordinates = list(self.subspace.coordinates.values())
        parts = gradient.split([coordinate.numel() for coordinate in coordinates])
        for coordinate, part in zip(coordinates, parts, strict=True):
            coordinate.grad = part.view(coordinate.shape).to(coordinate)

    def after_fold(self) -> None:
        """Forget all differences: those along the old bases say nothing about the new ones."""
        self._ring.zero_()
        if self._coherence is not None:
            self._coherence.forget()

    def logs(self) -> dict[str, float]:
        return {} if self._coherence is None else self._coherence.logs()

    def state(self) -> dict[str, Tensor]:
        state = {"differences": self._ring.clone(), "next_step": torch.tensor(self._next_step)}
        return state if self._coherence is None else state | {"coherence": self._coherence.state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._ring.copy_(state["differences"])
        self._next_step = int(state["next_step"])
        if self._coherence is not None:
            self._coherence.load(state.get("coherence"), self._next_step)
