"""Groups of rows with directions of their own, before the first step: their number, and their losses along one direction.

An engine that is asked for directions by rows gives all rows the same ones if the loss does not come apart. A rate for G
groups would then be up to G times too large. So a search lets the engine decide before it predicts anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.rng import Stream

#: The micro-batches of a step: for each, a function that evaluates its loss, and its weight in the step's loss.
Batch = Sequence[tuple[Callable[[], Any], float | Tensor]]


def groups_of_step(zo: ZerothOrder, batch: Batch) -> int:
    """Return the number of groups in a step of all ranks; 1 if all rows share directions.

    If the engine has not decided whether the loss comes apart by rows, it does so now, in four forward passes, and its
    first step does not. All ranks must call this function.

    Args:
        zo: the engine.
        batch: the micro-batches of a step.
    """
    groups = zo.row_groups
    if groups is None:
        return 1
    closure, _ = batch[0]
    random = zo.begin(lambda i: Stream(zo.seed, -1, i))
    works = groups.decide(closure, zo.estimator.probes()[-1], random)
    random.restore()
    return groups.in_step(len(batch)) if works else 1


def shares_at(zo: ZerothOrder, batch: Batch, stream: Stream, scales: Sequence[float]) -> list[list[float]]:
    """Return each group's share of a batch's loss at points along one direction, which all groups have.

    Args:
        zo: the engine, whose loss comes apart by rows.
        batch: the micro-batches of a step.
        stream: the stream of the direction.
        scales: distances along it, none of them 0; each takes a forward pass for every micro-batch.

    Returns:
        A list for each group of the step, of all ranks, with a loss for each distance.
    """
    groups, probes = zo.row_groups, [Probe(0, scale) for scale in scales]
    assert groups is not None
    random = zo.begin(lambda i: stream)
    # The first step makes the choice that batched_probes="auto" stands for, not this evaluation.
    batched, zo.evaluator.batched = zo.evaluator.batched, False
    try:
        for closure, weight in batch:
            groups.evaluate(closure, probes, random, weight)
    finally:
        zo.evaluator.batched = batched
    random.restore()
    return groups.gather()
