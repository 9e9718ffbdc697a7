from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_hf.parallel.checksum import BLOCK, saved_hash, tensor_checksum

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.bool]


def reference(words: list[int]) -> int:
    """The formula of the module's docstring, in Python's integers."""
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x &= mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    total = len(words) * golden
    for i, word in enumerate(words):
        block, place = divmod(i, BLOCK)
        total += word * (mix((place + 1) * golden) | 1) * (mix(~block) | 1)
    return mix(total)


@pytest.mark.parametrize("size", [0, 1, 7, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
def test_it_is_the_formula_in_chunks_of_any_size(size: int) -> None:
    words = torch.randint(-(2**31), 2**31, (size,), generator=torch.Generator().manual_seed(size), dtype=torch.int32)
    expected = reference(words.tolist())
    for blocks in (1, 2, 16):
        assert tensor_checksum(words, blocks) == expected
    assert tensor_checksum(words.view(torch.float32)) == expected


@settings(max_examples=100, deadline=None)
@given(position=st.integers(0, 2 * BLOCK), bit=st.integers(0, 31))
def test_every_bit_counts(position: int, bit: int) -> None:
    tensor = torch.arange(2 * BLOCK + 1, dtype=torch.int32)
    before = tensor_checksum(tensor)
    tensor[position] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert tensor_checksum(tensor) != before


@settings(max_examples=100, deadline=None)
@given(first=st.integers(0, 2 * BLOCK), second=st.integers(0, 2 * BLOCK))
def test_order_counts(first: int, second: int) -> None:
    tensor = torch.arange(2 * BLOCK + 1, dtype=torch.int32)
    before = tensor_checksum(tensor)
    tensor[first], tensor[second] = tensor[second].clone(), tensor[first].clone()
    assert (tensor_checksum(tensor) == before) == (first == second)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
def test_every_dtype_and_layout(dtype: torch.dtype) -> None:
    tensor = (torch.arange(60).view(3, 4, 5) % 7 - 3).to(dtype)
    assert tensor_checksum(tensor) == tensor_checksum(tensor.clone().view(60))
    assert tensor_checksum(tensor.transpose(0, 2)) == tensor_checksum(tensor.transpose(0, 2).contiguous())
    assert tensor_checksum(tensor.transpose(0, 2)) != tensor_checksum(tensor)
    assert tensor_checksum(tensor[0, 0, 0]) == tensor_checksum(tensor[0, 0, :1])
    assert tensor_checksum(tensor[0]) != tensor_checksum(tensor[:2])


def test_zeros_at_the_end_and_the_sign_of_zero_count() -> None:
    zeros = torch.zeros(4)
    assert len({tensor_checksum(zeros), tensor_checksum(torch.zeros(5)), tensor_checksum(-zeros)}) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_hash_of_what_is_saved_sees_every_byte_name_and_shape(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).remainder(2).to(dtype).view(3, 4)
    found = saved_hash({"a": tensor, "b": tensor[0]})
    assert found == saved_hash({"b": tensor[0].clone(), "a": tensor.t().contiguous().t()})
    changed = tensor.clone()
    changed[2, 3] = 0
    others = [{"a": changed, "b": tensor[0]}, {"a": tensor.view(4, 3), "b": tensor[0]}, {"a": tensor, "c": tensor[0]}]
    assert len({found, *map(saved_hash, others), saved_hash({})}) == 5
