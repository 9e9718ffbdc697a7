"""The best of staying, stepping, and stepping back (ZO-SGD-Cons, Zhang et al., arXiv 2402.11592).

    ξ ← argmin { L(ξ), L(ξ - η·ĝ), L(ξ + η·ĝ) }         all three on the step's own batches

Cost: three forward passes more than the estimator's, two where it has a clean loss. Of equal losses, ξ stays; one that is
not a number is never chosen. The step's batches are kept until then, and the loss on them never rises in a step. Weight
decay comes on top of the step and is not part of what is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer

from zo_hf.method import Method
from zo_hf.optimizers.rule import Rule, is_plain_descent


class Conservative(Rule):
    """Records 0, 1 or -1 for every step: by how many steps ξ moved."""

    name = "conservative"
    about = Method("ZO-SGD-Cons (2402.11592)", forwards="+3, or +2 beside a clean loss", needs="optim=sgd")
    needs_tensors = True
    candidates = (0.0, 1.0, -1.0)

    def check_optimizer(self, optimizer: Optimizer) -> None:
        if not is_plain_descent(optimizer):
            raise ValueError(
                f"zo_rule='conservative' compares steps of plain SGD, and {type(optimizer).__name__} is to make others; "
                "use optim='sgd' without momentum."
            )

    def choose(self, losses: Sequence[float]) -> float:
        comparable = [math.inf if math.isnan(loss) else loss for loss in losses]
        return self.candidates[comparable.index(min(comparable))]

    def take(self, candidate: float) -> None:
        for coordinate in self.subspace.coordinates.values():
            if coordinate.grad is not None:
                if candidate:
                    coordinate.grad.mul_(candidate)
                else:
                    coordinate.grad.zero_()
