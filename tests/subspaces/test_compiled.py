"""A compiled model with moving parameters is one graph, which stays the same from step to step and after a fold.

The backend is torch's own eager one: what matters here is what the compiler sees, and code generation takes long.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.conftest import seeded, tiny_llama, tiny_opt
from tests.subspaces.helpers import batch_for, prepared, sgd
from zo_hf.directions import GAUSSIAN
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.evaluation.model_loss import LossChecks, ModelLoss
from zo_hf.rng import Stream
from zo_hf.subspaces import LowRank, per_group, reads

STEPS, FOLD_STEPS = 5, 3


def _graphs_after_every_step(model: nn.Module, subspace: str, rows: int) -> list[int]:
    """The number of graphs that have been compiled after each step; a fold follows step `FOLD_STEPS`."""
    torch._dynamo.reset()
    counters.clear()
    zo = ZerothOrder(model, subspace, rows_per_direction=rows, batched=not rows, fold_steps=FOLD_STEPS)
    batch, checks = batch_for(model), LossChecks(is_known=True)
    if zo.row_groups is not None:  # the first batch would compare each row with itself, in graphs of their own
        zo.row_groups.comes_apart = True
        zo.row_groups.expect(len(batch["labels"]), 1)
    optimizer = sgd(zo, lr=1e-3)
    compiled = torch.compile(model, backend="eager")
    inner = model.get_base_model() if subspace == "adapter" else model
    found = []
    try:
        for _ in range(STEPS):
            zo.estimate(ModelLoss(compiled, inner, batch, lambda inputs: compiled(**inputs).loss, checks=checks))
            optimizer.step()
            found.append(counters["stats"]["unique_graphs"])
    finally:
        zo.subspace.detach()
        torch._dynamo.reset()
    return found


@pytest.mark.parametrize(
    ("subspace", "rows"),
    [
        pytest.param(subspace, rows, marks=pytest.mark.slow if (subspace, rows) != ("norms", 0) else ())
        for subspace in ("low_rank", "core", "norms", "scales", "adapter")
        for rows in (0, 1)
    ],
)
def test_a_model_is_one_graph_for_the_whole_run(subspace: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step watches which parameters are read, and the others do not; with rows, each sign has a pass."""
    monkeypatch.setattr(reads, "LOOK_EVERY", 2)  # only the first step does, if forwards are compiled
    graphs = _graphs_after_every_step(prepared(subspace, seeded(tiny_opt, num_hidden_layers=1)), subspace, rows)
    assert not counters["graph_break"]
    assert graphs[0] <= 1 + rows
    assert graphs[1:] == [graphs[1]] * (STEPS - 1)
    assert graphs[1] - graphs[0] <= 1


class _Doubled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 2 * super().forward(ids)


def test_what_is_found_out_about_another_model_compiles_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lookups and norms are compared with random numbers, outside of compiled code."""
    monkeypatch.setattr(per_group, "_BROADCASTS", {})  # as in a new process
    torch._dynamo.reset()
    counters.clear()
    ids, probes = torch.arange(8).view(4, 2), (Probe(0, 1.0), Probe(0, -1.0))

    def attached(norm: nn.Module) -> LowRank:
        subspace = LowRank(nn.Sequential(_Doubled(8, 4), norm, nn.Linear(4, 1)), rank=2)
        subspace.attach()
        return subspace

    def evaluate(subspace: LowRank, forward: Callable) -> int:
        with torch.no_grad(), subspace.at(probes, lambda i: Stream(0, 0, i), GAUSSIAN, rows=2):
            forward(ids)
        return counters["stats"]["unique_graphs"]

    others = [attached(nn.Identity())]
    evaluate(others[0], others[0].model)
    subspace = attached(nn.LayerNorm(4))
    compiled = torch.compile(subspace.model, backend="eager")
    evaluate(subspace, compiled)
    graphs = evaluate(subspace, compiled)
    others.append(attached(nn.RMSNorm(4)))
    evaluate(others[1], others[1].model)
    assert evaluate(subspace, compiled) == graphs > 0
    torch._dynamo.reset()


@pytest.mark.slow
def test_norms_of_transformers_are_compared_before_they_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison with random numbers, which a compiler cannot trace."""
    monkeypatch.setattr(per_group, "_BROADCASTS", {})
    graphs = _graphs_after_every_step(seeded(tiny_llama, num_hidden_layers=1), "low_rank", 0)
    assert not counters["graph_break"]
    assert graphs[-1] == 2
    assert all(per_group._BROADCASTS.values())
