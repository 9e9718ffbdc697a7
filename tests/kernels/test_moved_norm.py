"""A norm with parameters of every group in one launch, against the same formula in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.table import DEVICE

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def check(dtype: torch.dtype, groups: int, rows: int, width: int, centers: bool, has_bias: bool) -> None:
    """Compare all groups, whose parameters lie in a tensor with those of other layers."""
    from zo_hf.kernels.moved_norm import moved_norm

    generator = torch.Generator().manual_seed(width)
    x = (3 + 2 * torch.randn(groups * rows, width, generator=generator)).to(DEVICE, dtype)
    point = torch.randn(groups, 2 * width + 7, generator=generator).to(DEVICE)
    weight, bias = point[:, :width], point[:, width + 7 :] if has_bias else None
    expected = x.double().view(groups, rows, width)
    if centers:
        expected = expected - expected.mean(-1, keepdim=True)
    expected = expected / (expected.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()[:, None]
    if bias is not None:
        expected = expected + bias.double()[:, None]
    found = moved_norm(x, weight, bias, 1e-5, centers)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected.flatten(0, 1), rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("centers", "has_bias"), [(True, True), (True, False), (False, False)], ids=["layer norm", "no bias", "RMS norm"]
)
def test_two_groups(dtype: torch.dtype, centers: bool, has_bias: bool) -> None:
    check(dtype, 2, 3, 96, centers, has_bias)


@settings(max_examples=10, deadline=None)
@given(groups=st.integers(1, 4), rows=st.integers(1, 5), width=st.integers(2, 300))
def test_any_shape(groups: int, rows: int, width: int) -> None:
    check(torch.float32, groups, rows, width, True, True)


def test_a_row_far_from_zero_keeps_its_variance() -> None:
    """A variance of E[x²] - E[x]² would lose it."""
    from zo_hf.kernels.moved_norm import moved_norm

    x = torch.tensor([[4096.0, 4097.0, 4098.0, 4099.0]], device=DEVICE)
    found = moved_norm(x, torch.ones(1, 4, device=DEVICE), None, 0.0, True)
    torch.testing.assert_close(found, torch.nn.functional.layer_norm(x, (4,), eps=0.0), rtol=1e-6, atol=1e-6)
