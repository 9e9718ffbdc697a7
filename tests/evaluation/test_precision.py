"""What rounding explains depends on the dtype of the computation, not on that of the loss; and what memory allows."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.conftest import causal_batch, seeded, tiny_llama
from tests.subspaces.helpers import loss_of
from zo_hf import ZerothOrder
from zo_hf.estimators import SecondDifference
from zo_hf.evaluation import free_memory
from zo_hf.evaluation.curvature_probes import CurvatureProbes
from zo_hf.evaluation.precision import coarsest, rounding


def test_the_coarsest_dtype_counts() -> None:
    model = seeded(tiny_llama)
    assert coarsest(model, torch.float32, None) == torch.float32
    assert coarsest(model, torch.float32, torch.bfloat16) == torch.bfloat16
    assert coarsest(model.half(), torch.float32) == torch.float16
    model.lm_head.to(torch.bfloat16)
    assert coarsest(model, torch.float32) == torch.bfloat16
    assert coarsest(torch.nn.Identity(), torch.float64) == torch.float64
    assert rounding(torch.float64) < rounding(torch.float32) < rounding(torch.float16) < rounding(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rounding_of_a_curvature_is_that_of_the_computation(dtype: torch.dtype) -> None:
    model = seeded(tiny_llama, dtype)
    zo = ZerothOrder(model, rows_per_direction=0, batched_probes=False)
    zo.curvature = CurvatureProbes(zo.estimator, 1)
    estimate = zo.estimate(lambda: model(**causal_batch()).loss)
    assert zo.evaluator.dtype == torch.float32, "transformers returns this for any model"
    expected = 6**0.5 * torch.finfo(dtype).eps * estimate.loss / SecondDifference(zo.estimator.eps, 1).eps ** 2
    assert zo.curvature.rounding == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("free", "fits"), [(10**9, True), (10**8, False)])
def test_probes_share_a_forward_pass_if_there_is_room(
    free: int, fits: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device with 2 GB in use, of which a forward pass takes 0.2 GB; torch has set 0.1 GB more aside."""
    monkeypatch.setattr(free_memory, "can_say", lambda device: True)
    statistics = {"memory_allocated": 18 * 10**8, "max_memory_allocated": 2 * 10**9, "memory_reserved": 19 * 10**8}
    for name, value in (statistics | {"mem_get_info": (free, 8 * 10**9), "reset_peak_memory_stats": None}).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    model = seeded(tiny_llama)
    zo = ZerothOrder(model, rows_per_direction=0)
    with caplog.at_level(logging.INFO, logger="zo_hf"):
        zo.estimate(loss_of(model, causal_batch()))
    assert zo.evaluator.batched is fits
    assert ("needs about 0.4 GB, and 0.2 GB are free" in caplog.text) is not fits
