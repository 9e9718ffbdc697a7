"""Whether the loss of a run's first batch comes apart by rows, found out in three more forward passes.

whole     the caller's loss, and one direction for all rows
alone     the groups' shares at the same point, which must add up to it
others    their shares when some groups are far away, which must leave those of the other groups alone

A model that joins the tokens of rows takes two more, in which every second group is far away: rows of unlike length would have
tokens in the part of a neighbor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from zo_hf.estimators.probe import Probe


def passes_of_check(probes: Sequence[Probe]) -> int:
    """Return the forward passes that a run's first micro-batch takes beyond its probes, if its loss comes apart."""
    return 6 if any(probe.derivative for probe in probes) else 3  # a pass with tangents counts as two


def passes_of_joined(probes: Sequence[Probe]) -> int:
    """Return the forward passes that it takes in addition for a model that joins the tokens of rows."""
    return 4 if any(probe.derivative for probe in probes) else 2


def some_elsewhere(points: Sequence[Probe]) -> list[Probe]:
    """Return the points of the groups with some of them far away, so that rows which depend on those show that.

    Args:
        points: a point for every group. For a derivative, far away is the direction of the first group.
    """
    return [point if _is_kept(group) else _elsewhere(point, points[0]) for group, point in enumerate(points)]


def others_elsewhere(points: Sequence[Probe], kept: int) -> list[Probe]:
    """Return the points of the groups with every second one far away; `kept` is 0 or 1, the first that is not."""
    return [point if group % 2 == kept else _elsewhere(point, points[kept]) for group, point in enumerate(points)]


def why_not_joined(shares: Tensor, others: Sequence[Tensor], rounding: float) -> str | None:
    """Return why tokens that the model joins do not come apart, or None.

    Args:
        shares: the groups' shares at a probe, as in `why_not_apart`.
        others: the shares at the points of `others_elsewhere` for 0 and 1.
        rounding: the relative difference that rounding explains.
    """
    smallest = torch.finfo(shares.dtype).tiny
    for kept, moved in enumerate(others):
        if not bool((10 * ((shares - moved).abs() / shares.abs().clamp(min=smallest))[:, kept::2] <= rounding).all()):
            return "the model joins the tokens of rows of unlike length"
    return None


def why_not_apart(shares: Tensor, others: Tensor, alone: Tensor, whole: Tensor, rounding: float) -> str | None:
    """Return why the first batch does not come apart, or None.

    Shares are (1, groups), and (2, groups) with their derivatives below if probes ask for those.

    Args:
        shares: the groups' shares at a probe, each with its own direction.
        others: the shares at the points of `some_elsewhere`.
        alone: the shares if all rows have the last group's direction, from a forward without groups.
        whole: the caller's loss at that point, (1,), and its derivative.
        rounding: the relative difference that rounding explains.
    """
    # A sum of derivatives may be small where they are large.
    size = torch.maximum(whole.abs(), alone.abs().amax(1)).clamp(min=1.0)
    smallest, dependent = torch.finfo(shares.dtype).tiny, (shares - others).abs()
    kept = torch.tensor([_is_kept(group) for group in range(shares.shape[1])], device=shares.device)
    apart = {
        "its rows give another loss together": (alone.sum(1) - whole).abs() / size,
        "its last row gives another loss with a direction of its own": (shares - alone)[:, -1].abs() / size,
        # The same kernels on the same rows, so rounding hardly differs.
        "its rows depend on each other": 10 * (dependent / shares.abs().clamp(min=smallest))[:, kept],
    }
    found = [(reason, by.max().item()) for reason, by in apart.items() if not bool((by <= rounding).all())]
    return f"{found[0][0]} (relative difference {found[0][1]:.2g})" if found else None


def _is_kept(group: int) -> bool:
    """Return whether a group keeps its point when others move: those with an even number of ones in binary.

    Groups whose numbers differ by any power of two are then told apart somewhere, for example neighbors and halves.
    """
    return group.bit_count() % 2 == 0


def _elsewhere(probe: Probe, other: Probe) -> Probe:
    return replace(probe, scale=-100 * probe.scale) if probe.scale else replace(probe, direction=other.direction)
