"""The checksum against plain Python integers, and what it has to notice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zo_hf import checksum
from zo_hf.checksum import tensor_checksum

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
]
DTYPES += [torch.float8_e4m3fn, torch.complex64]


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20))
def test_it_is_the_sum_of_the_docstring(values: list[int]) -> None:
    expected = sum(value * (2 * i + 1) * (0x9E3779B97F4A7C15) for i, value in enumerate(values)) % 2**64
    assert tensor_checksum(torch.tensor(values, dtype=torch.int32)) % 2**64 == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_single_change_is_noticed_whatever_the_dtype(dtype: torch.dtype) -> None:
    tensor = torch.zeros(50).to(dtype)
    before = tensor_checksum(tensor)
    for i in range(50):
        changed = tensor.clone()
        changed[i] = 1
        assert tensor_checksum(changed) != before


def test_swapped_elements_and_the_sign_of_zero_are_noticed() -> None:
    x = torch.arange(6.0)
    assert tensor_checksum(x) != tensor_checksum(x.flip(0))
    assert tensor_checksum(torch.tensor([0.0])) != tensor_checksum(torch.tensor([-0.0]))


def test_it_does_not_depend_on_chunks_or_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 11)
    whole = tensor_checksum(x)
    monkeypatch.setattr(checksum, "CHUNK", 5)
    assert tensor_checksum(x) == tensor_checksum(x.t().contiguous().t()) == whole
