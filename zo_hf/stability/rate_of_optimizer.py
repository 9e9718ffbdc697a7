"""What a learning rate means to an optimizer, in terms of plain SGD on slopes.

With momentum β a step is 1/(1 - β) as long in the end; Adam, zo_normalize and zo_rule=sign divide the size of c out, so that
the rate is that of SGD times √E[c²] (Adam's: times √(E[c²]/q)), and steps do not get shorter as slopes do.
"""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer

from zo_hf.optimizers import SeededSGD
from zo_hf.optimizers.sign import Sign
from zo_hf.stability.descent import ADAM
from zo_hf.zeroth_order import ZerothOrder


def check_findable(zo: ZerothOrder, optimizer: Optimizer) -> None:
    """Refuse a run whose rate these probes say nothing about.

    Raises:
        ValueError: the message names the option and what to use instead.
    """
    estimator, rule = zo.estimator, zo.rule
    way_out = "give a number, or leave learning_rate out for the default"
    if estimator.is_scale_free or estimator.along_coordinates:
        raise ValueError(
            f"learning_rate='auto' is for slopes along random directions, and zo_estimator={estimator.name!r} makes none; "
            f"{way_out}."
        )
    if rule.name not in ("none", Sign.name):
        raise ValueError(
            f"learning_rate='auto' does not know how long the steps of zo_rule={rule.name!r} are; {way_out}."
        )
    if not isinstance(optimizer, (torch.optim.SGD, SeededSGD, *ADAM)):
        raise ValueError(
            f"learning_rate='auto' does not know how long the steps of {type(optimizer).__name__} are; use optim='sgd' or "
            f"'adamw_torch', or {way_out}."
        )


def divides_scale_out(zo: ZerothOrder, optimizer: Optimizer) -> bool:
    """Whether the size of c is divided out on the way to a step."""
    return zo.rule.divides_scale_out or zo.normalisation is not None or isinstance(optimizer, ADAM)


def unit_of_rate(zo: ZerothOrder, optimizer: Optimizer, slope_square: float) -> float:
    """What a rate of plain SGD is multiplied by to make steps as long with this optimizer where E[c²] is `slope_square`."""
    length = math.sqrt(slope_square) if divides_scale_out(zo, optimizer) else 1.0
    if isinstance(optimizer, ADAM):
        return length / math.sqrt(zo.estimator.num_directions)
    group = optimizer.param_groups[0]
    momentum = group.get("momentum", 0.0)
    return length * (1 - momentum) / (1 - group.get("dampening", 0.0) if momentum else 1.0)
