"""SGD that regenerates its update from seeds (Malladi et al., arXiv 2305.17333, algorithm 1).

    θ ← (1 - η·λ) · θ - η · Σᵢ cᵢ · zᵢ

One pass over the weights applies any number of directions, and no gradient is ever stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer

from zo_hf.subspaces.full import Full


class SeededSGD(Optimizer):
    """The optimizer of the `full` subspace.

    Args:
        params: parameters or parameter groups; `subspace` moves all of them.
        subspace: holds the pending estimate.
        lr: learning rate η.
        weight_decay: decoupled weight decay λ of a parameter group.
    """

    def __init__(self, params: Iterable[Any], subspace: Full, lr: float = 1e-6, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._subspace = subspace

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply the pending estimate and discard it; without one, write nothing and apply no weight decay."""
        loss = None if closure is None else closure()
        if self._subspace.pending:
            for group in self.param_groups:
                for parameter in group["params"]:
                    decay = 1.0 - group["lr"] * group["weight_decay"]
                    self._subspace.apply_pending(parameter, group["lr"], decay)
        self._subspace.clear_gradient()
        return loss
