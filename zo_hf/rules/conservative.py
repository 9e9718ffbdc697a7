"""The best of staying, stepping, and stepping back (ZO-SGD-Cons, Zhang et al., arXiv 2402.11592).

    ξ ← argmin { L(ξ), L(ξ - η·ĝ), L(ξ + η·ĝ) }         all three on the step's own batches

Cost: three forward passes beyond the estimator's, or two if the estimator evaluates L(ξ) itself. If losses are equal,
ξ stays; a candidate whose loss is not a number is never chosen. The step's batches are kept until the choice is made,
and the loss on them never rises in a step. Weight decay is added to the chosen step and takes no part in the
comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer

from zo_hf.method_info import Method
from zo_hf.rules.rule import Rule, is_plain_descent


class Conservative(Rule):
    """The rule of the module's formula. It records the multiple of -η·ĝ by which ξ moved in a step: 0, 1 or -1."""

    name = "conservative"
    about = Method("ZO-SGD-Cons (2402.11592)", forwards="+3, or +2 with a clean loss", needs="optim=sgd")
    needs_tensors = True
    candidates = (0.0, 1.0, -1.0)

    def check_optimizer(self, optimizer: Optimizer) -> None:
        if not is_plain_descent(optimizer):
            raise ValueError(
                f"zo_rule='conservative' compares steps of plain SGD, and {type(optimizer).__name__} makes different "
                "steps; use optim='sgd' without momentum."
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
