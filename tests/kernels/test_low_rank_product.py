"""The correction of a linear layer in one launch, against the same sum in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.table import DEVICE

pytest.importorskip("triton")

# The thin product and the sum are each rounded once; the interpreter cuts a bfloat16 off where a GPU rounds it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def check(dtype: torch.dtype, groups: int, rows: int, features: tuple[int, int], width: int, bias: int) -> None:
    """Compare all groups, whose factors lie in a tensor with those of other layers; bias: its column, or -1."""
    from zo_hf.kernels.low_rank_product import add_low_rank_product

    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(0.3).to(DEVICE, dtype)

    width_in, width_out = features
    x, basis, output = random(groups * rows, width_in), random(width_in, width), random(groups * rows, width_out)
    factors = random(groups, width_out + 5, width)[:, 2 : 2 + width_out]
    thin = x.double() @ basis.double()
    if bias >= 0:
        thin[:, bias] += 1
    expected = output.double().view(groups, rows, -1) + thin.view(groups, rows, -1) @ factors.double().mT
    add_low_rank_product(output, x, basis, factors, bias)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(output.double(), expected.flatten(0, 1), rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [-1, 4], ids=["no bias", "a bias"])
def test_both_signs_of_a_direction(dtype: torch.dtype, bias: int) -> None:
    check(dtype, 2, 17, (130, 150), 8, bias)


@settings(max_examples=10, deadline=None)
@given(
    groups=st.integers(1, 4),
    rows=st.integers(1, 40),
    given=st.integers(1, 200),
    made=st.integers(1, 300),
    width=st.integers(1, 4),
)
def test_any_shape(groups: int, rows: int, given: int, made: int, width: int) -> None:
    check(torch.float32, groups, rows, (given, made), 8 * width, 8 * width - 1)


def test_rows_apart_in_memory_and_no_rows() -> None:
    from zo_hf.kernels.low_rank_product import add_low_rank_product

    x = torch.arange(40.0, device=DEVICE).view(4, 10)[:, :5]
    basis, factors = torch.eye(5, 8, device=DEVICE), torch.eye(5, 8, device=DEVICE)[None]
    output = torch.zeros(4, 5, device=DEVICE)
    add_low_rank_product(output, x, basis, factors, -1)
    assert torch.equal(output, x)
    add_low_rank_product(output[:0], x[:0], basis, factors, -1)
