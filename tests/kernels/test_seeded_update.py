"""The update of all weights in one launch has the bits of torch's update, tile by tile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.methods.table import DEVICE
from zo_hf import kernels
from zo_hf.directions import DISTRIBUTIONS
from zo_hf.rng import Stream
from zo_hf.subspaces import Full

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def updated(
    choice: str, weight: torch.Tensor, direction: str, coefficients: list[float], decay: float
) -> torch.Tensor:
    """The weight after a step, updated by kernels or by torch."""
    model = nn.Linear(1, len(weight), bias=False).to(weight.device, weight.dtype)
    model.weight.data = weight.clone().view(-1, 1)
    subspace = Full(model, seed=3)
    distribution = DISTRIBUTIONS[direction](subspace.direction_context())
    subspace.write_gradient(coefficients, lambda index: Stream(3, 9, index), distribution)
    kernels.choose(choice, weight.device)
    try:
        subspace.apply_pending(model.weight, learning_rate=1e-3, decay=decay)
    finally:
        kernels.choose("auto", weight.device)
    return model.weight.data.flatten()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", ["gaussian", "rademacher"])
@settings(max_examples=12, deadline=None)
@given(
    size=st.one_of(st.integers(1, 400), st.just(4097)),
    coefficients=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=4),
    decay=st.sampled_from([1.0, 0.999]),
    scale=st.sampled_from([1.0, 2.0**-14, 2.0**-23]),
)
def test_has_the_bits_of_torch(
    dtype: torch.dtype, direction: str, size: int, coefficients: list[float], decay: float, scale: float
) -> None:
    """Sizes around a tile, several directions, decay, and weights that float16 holds as subnormals."""
    weight = (torch.randn(size, generator=torch.Generator().manual_seed(size)) * scale).to(DEVICE, dtype)
    expected = updated("torch", weight, direction, coefficients, decay)
    assert torch.equal(updated("triton", weight, direction, coefficients, decay), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_finite_stays(dtype: torch.dtype) -> None:
    weight = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0], dtype=dtype, device=DEVICE)
    found = updated("triton", weight, "rademacher", [1.0], 1.0)
    assert found[:2].tolist() == weight[:2].tolist()
    assert found.isnan().tolist() == [False, False, True, False]


def test_a_small_update_survives_on_average() -> None:
    """A hundredth of the distance to the next bfloat16, of which rounding to nearest would keep nothing."""
    weight = torch.ones(40_000, dtype=torch.bfloat16, device=DEVICE)
    step = 2.0**-7 / 100
    moved = updated("triton", weight, "rademacher", [step / 1e-3], 1.0).double() - 1
    size = moved.abs()
    assert set(size.unique().tolist()) <= {0.0, 2.0**-7, 2.0**-8}
    assert size.mean().item() == pytest.approx(step, rel=0.25)
