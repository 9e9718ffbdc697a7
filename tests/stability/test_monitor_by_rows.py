"""The monitor with a direction for every group of rows, on a quadratic whose groups have known shares."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zo_hf.directions import GAUSSIAN
from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.row_losses import RowLosses
from zo_hf.rng import Stream, draw_slice
from zo_hf.stability import critical_step_size
from zo_hf.stability.monitor import StabilityMonitor, stability
from zo_hf.subspaces.full_in_memory import FullInMemory

D, GROUPS = 30, 6


class Rows(nn.Module):
    """½·(x·w)² for every row x, float64; D rows make up a group.

    Args:
        differ: the groups see parts of the coordinates that do not overlap, instead of all of them. The Hessian of the
            mean is the identity with both.
    """

    def __init__(self, differ: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(D, 1, bias=False).double()
        nn.init.ones_(self.layer.weight)
        self.x = torch.eye(D, dtype=torch.float64).repeat(GROUPS, 1) * D**0.5
        if differ:
            self.x = torch.eye(D, dtype=torch.float64).repeat_interleave(GROUPS, 0) * D**0.5

    def loss(self, rows: slice = slice(None)) -> RowLosses:
        return RowLosses(self.layer(self.x[rows])[:, 0].square() / 2)

    def hessians(self) -> Tensor:
        """Those of the groups' shares, (groups, D, D)."""
        parts = self.x.view(GROUPS, -1, D)
        return parts.mT @ parts / len(self.x)


def watched(
    model: Rows, rate: float, q: int = 1, every: int = 1, **options: Any
) -> tuple[ZerothOrder, StabilityMonitor]:
    zo = ZerothOrder(
        model, FullInMemory(model, seed=1), seed=1, eps=1e-2, num_directions=q, rows_per_direction=D, **options
    )
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=rate))
    return zo, StabilityMonitor(zo, optimizer, every)


def run(zo: ZerothOrder, model: Rows, steps: int, micro_batches: int = 1) -> None:
    size = len(model.x) // micro_batches
    for _ in range(steps):
        for number in range(micro_batches):
            zo.probe(partial(model.loss, slice(number * size, (number + 1) * size)), 1 / micro_batches)
        zo.finish_estimate()
        zo.optimizer.step()


@pytest.mark.parametrize("estimator", ["two_point", "one_sided", "second_difference"])
@pytest.mark.parametrize("differ", [False, True])
def test_the_curvature_is_the_sum_of_the_groups(differ: bool, estimator: str) -> None:
    """κ = Σ_g z_gᵀH_g z_g along the step's own directions, whatever the number of micro-batches."""
    found = []
    for micro_batches in (1, 2):
        model = Rows(differ)
        zo, monitor = watched(model, 0.0, 1, every=3, estimator=estimator)
        run(zo, model, 7, micro_batches)
        expected = []
        for step in (0, 3, 6):
            z = [draw_slice(Stream(1, step, g), "layer.weight", 0, D, GAUSSIAN).double() for g in range(GROUPS)]
            z = torch.stack(z)
            expected.append(float(torch.einsum("gi,gij,gj->", z, model.hessians(), z)))
        assert monitor.probes.curvatures == pytest.approx(expected, rel=1e-6)
        each, measured = (3, 0) if estimator == "second_difference" else (2, 1)
        # The first batch is evaluated once for its number of rows, and three times to see whether they come apart.
        assert zo.forward_passes == (7 * each + 3 * measured) * micro_batches + 4
        found.append(monitor.found.critical_upper)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("q", [1, 2])
def test_the_bounds_are_those_of_as_many_directions_as_there_are_groups(q: int) -> None:
    model = Rows()
    zo, monitor = watched(model, 0.0, q)
    run(zo, model, 40)
    found, truth = monitor.found, critical_step_size([1.0] * D, num_directions=q * GROUPS)
    assert found.trace.value == pytest.approx(D, abs=4 * found.trace.standard_error)
    again = stability(monitor.probes.curvatures, 0.0, measured_directions=q * GROUPS, num_directions=q * GROUPS)
    assert (found.critical_lower, found.critical_upper) == (again.critical_lower, again.critical_upper)
    assert found.critical_upper == pytest.approx(truth, rel=0.2)
    assert found.lambda_max == pytest.approx(D**0.5, rel=0.3)  # the Frobenius norm
    assert found.critical_lower < truth and truth > 1.5 * critical_step_size([1.0] * D, num_directions=q)


def test_the_ratio_predicts_divergence() -> None:
    for ratio, blows_up in ((0.8, False), (1.25, True)):
        model = Rows()
        rate = ratio * critical_step_size([1.0] * D, num_directions=GROUPS)
        zo, monitor = watched(model, rate, every=10)
        run(zo, model, 41)
        assert monitor.found.ratio == pytest.approx(ratio, rel=0.2)
        run(zo, model, 160)
        loss = model.loss().mean_loss().item()
        assert loss > 150 if blows_up else loss < 1.5


def test_nothing_is_measured_where_groups_share_directions_in_pairs() -> None:
    model = Rows()
    zo, monitor = watched(model, 0.0, every=2, noise_scale_steps=3)
    run(zo, model, 9)
    assert len(monitor.probes.curvatures) == 5 - 2  # of the steps 0, 2, 4, 6, 8 without 2 and 8


def test_groups_that_differ_lower_the_critical_rate() -> None:
    """So the bound is none from below: with shares of disjoint coordinates, the run is one of a direction for each part."""
    same, differ = (spread(Rows(kind)) for kind in (False, True))
    assert same < 10 and differ > 1e3


def spread(model: Rows) -> float:
    """The loss after some steps at a rate between the critical ones."""
    zo, _ = watched(model, 0.5 * critical_step_size([1.0] * D, num_directions=GROUPS))
    run(zo, model, 100)
    return model.loss().mean_loss().item()
