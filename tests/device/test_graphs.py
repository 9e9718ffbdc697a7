"""CUDA graphs on the device: a GPU captures them, and on a CPU operations are recorded in their place."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from tests.conftest import tiny_llama
from tests.gpu.graph_runs import Run
from tests.gpu.recorded_graph import recorded_graphs
from tests.methods.table import DEVICE


@pytest.mark.parametrize("rows", [0, 1], ids="rows {}".format)
def test_a_run_with_graphs_takes_the_steps_of_one_without(rows: int) -> None:
    """Through a fold, an evaluation and a batch of another length; in float64, where kernels of attention hardly differ."""
    with nullcontext() if DEVICE.type == "cuda" else recorded_graphs():
        found = []
        for graph in (True, False):
            run = Run(tiny_llama, graph, device=DEVICE, dtype=torch.float64, rows_per_direction=rows)
            for seed, length in enumerate((8, 8, 8, 6, 8)):
                run.step(seed, length)
            run.evaluate()
            run.step(5)
            found.append((run.losses, run.bits()))
    (losses, mine), (expected, theirs) = found
    assert losses == pytest.approx(expected, rel=1e-6, abs=1e-8)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-8)
