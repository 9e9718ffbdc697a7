"""A linear layer along signs that no tensor holds, against the same sum in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.methods.table import DEVICE
from zo_hf.directions import RADEMACHER
from zo_hf.rng import Stream, draw_slice
from zo_hf.rng.stream import tensor_key

pytest.importorskip("triton")

# The interpreter cuts a bfloat16 off where a GPU rounds it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def signs(direction: int, name: str, *shape: int) -> Tensor:
    z = draw_slice(Stream(0, 0, direction), name, 0, torch.Size(shape).numel(), RADEMACHER)
    return z.view(shape).double().to(DEVICE)


def check(
    dtype: torch.dtype, rows: int, features: tuple[int, int], probes: list[tuple[int, float]], bias: str
) -> None:
    """Compare all probes; bias: "none", "still" or "moves"."""
    from zo_hf.kernels.perturbed_linear import perturbed_linear

    generator = torch.Generator().manual_seed(rows)
    width, count = features
    x = torch.randn(len(probes), rows, width, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(count, width, generator=generator).mul_(0.1).to(DEVICE, dtype)
    offset = torch.randn(count, generator=generator).to(DEVICE, dtype) if bias != "none" else None
    keys = [Stream(0, 0, direction).key for direction, _ in probes]
    tensors = tensor_key("w"), tensor_key("b") if bias == "moves" else None
    found = perturbed_linear(x, weight, offset, tensors, keys, [scale for _, scale in probes])
    assert found.dtype == dtype
    for part, inputs, (direction, scale) in zip(found, x, probes, strict=True):
        expected = inputs.double() @ (weight.double() + scale * signs(direction, "w", count, width)).t()
        if offset is not None:
            expected += offset.double()
        if bias == "moves":
            expected += scale * signs(direction, "b", count)
        torch.testing.assert_close(part.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", ["none", "still", "moves"])
def test_both_signs_of_a_direction(dtype: torch.dtype, bias: str) -> None:
    check(dtype, 5, (160, 70), [(0, 1e-2), (0, -1e-2)], bias)


@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 40), words=st.integers(1, 6), count=st.integers(1, 50), probes=st.integers(1, 4))
def test_any_shape(rows: int, words: int, count: int, probes: int) -> None:
    check(torch.float32, rows, (32 * words, count), [(i // 2, (-1) ** i * 1e-2) for i in range(probes)], "moves")


@pytest.mark.parametrize(
    "probes",
    [
        [(0, 0.1), (0, -0.1), (1, 0.1), (1, -0.1)],
        [(0, 0.0), (0, 0.1), (1, 0.1)],
        [(0, 0.1), (1, 0.1), (0, -0.1), (1, -0.1)],
        [(0, 0.1), (0, -0.1), (0, 0.2)],
    ],
    ids=["pairs", "one-sided", "apart", "three"],
)
def test_any_order_of_probes(probes: list[tuple[int, float]]) -> None:
    check(torch.float32, 3, (64, 40), probes, "moves")


def test_a_clean_probe_is_the_layer() -> None:
    from zo_hf.kernels.perturbed_linear import perturbed_linear

    x, weight = torch.ones(1, 2, 32, device=DEVICE), torch.ones(3, 32, device=DEVICE)
    assert perturbed_linear(x, weight, None, (1, None), [2], [0.0]).tolist() == [[[32.0] * 3] * 2]
