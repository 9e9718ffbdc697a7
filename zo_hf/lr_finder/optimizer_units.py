"""Conversion of a learning rate of plain SGD to the units of another optimizer.

Momentum β makes a step 1/(1 - β) times as long in the long run. Adam, zo_normalize and zo_rule=sign divide the size of
c out. Their rate is that of SGD times √E[c²] (for Adam √(E[c²]/q)), and their steps do not become shorter as slopes
become smaller. With directions for G groups of rows, a step of SGD is shorter, see `predicted_loss`. zo_rule=sign adds up G
steps of one group, and is √G times as long.
"""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer

from zo_hf.case import Case
from zo_hf.compatibility import check
from zo_hf.engine import ZerothOrder
from zo_hf.rules import SeededSGD
from zo_hf.stability.descent import ADAM


def check_findable(zo: ZerothOrder, optimizer: Optimizer) -> None:
    """Refuse a run whose learning rate the probes cannot determine.

    Raises:
        ValueError: the message names the option and what to use instead.
    """
    check(Case(zo.settings, {"learning_rate": "auto"}))
    if not isinstance(optimizer, (torch.optim.SGD, SeededSGD, *ADAM)):
        raise ValueError(
            f"learning_rate='auto' does not know how long the steps of {type(optimizer).__name__} are; use optim='sgd' or "
            "'adamw_torch', or give a number."
        )


def divides_scale_out(zo: ZerothOrder, optimizer: Optimizer) -> bool:
    """Return whether the size of c has no effect on the length of a step."""
    return zo.rule.divides_scale_out or zo.normalization is not None or isinstance(optimizer, ADAM)


def unit_of_rate(zo: ZerothOrder, optimizer: Optimizer, slope_square: float, groups: int = 1) -> float:
    """Return the factor that turns a rate of plain SGD into the optimizer's rate for steps of the same length.

    Where the size of c is divided out, the rate of SGD is that of steps whose groups of rows share their directions.

    Args:
        zo: the engine.
        optimizer: the optimizer that was passed to `zo.prepare`.
        slope_square: E[c²] of the whole batch's loss.
        groups: G, the number of groups of rows with directions of their own in a step.
    """
    length = math.sqrt(slope_square) if divides_scale_out(zo, optimizer) else 1.0
    if isinstance(optimizer, ADAM):
        return length / math.sqrt(zo.estimator.num_directions)
    if zo.rule.divides_scale_out:
        length /= math.sqrt(groups)
    group = optimizer.param_groups[0]
    momentum = group.get("momentum", 0.0)
    return length * (1 - momentum) / (1 - group.get("dampening", 0.0) if momentum else 1.0)
