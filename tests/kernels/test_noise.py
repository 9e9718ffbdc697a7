"""Noise that kernels draw has the bits of the noise that torch draws, for any cut, any streams and any distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.methods.table import DEVICE
from tests.rng.test_philox import COUNTER, philox_on_integers
from zo_hf.directions import ELEMENTWISE, Elementwise
from zo_hf.rng import NoiseLayout, Stream, draw_half_words, draw_rows, draw_slice
from zo_hf.rng.stream import tensor_key

pytest.importorskip("triton")

EVERY_DISTRIBUTION = pytest.mark.parametrize("distribution", ELEMENTWISE.values(), ids=ELEMENTWISE)
STREAM = Stream(seed=11, step=5, direction=2)
KEY = st.integers(0, 2**64 - 1)
# The fixture holds for all examples alike.
MANY = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@MANY
@given(counters=st.lists(COUNTER, min_size=1, max_size=9), keys=st.lists(KEY, min_size=1, max_size=3))
def test_blocks_are_those_of_python_integers(counters: list[tuple[int, ...]], keys: list[int]) -> None:
    from zo_hf.kernels.random_blocks import random_blocks

    columns = [torch.tensor(column, device=DEVICE) for column in zip(*counters, strict=True)]
    words = random_blocks(columns, keys).view(torch.int32).tolist()
    expected = [philox_on_integers(counter, (key % 2**32, key >> 32)) for key in keys for counter in counters]
    assert [tuple(word % 2**32 for word in block) for block in words] == expected


def test_a_word_that_all_counters_share_needs_no_copies() -> None:
    from zo_hf.kernels.random_blocks import random_blocks

    number, same = torch.arange(600, device=DEVICE), torch.tensor([7], device=DEVICE)
    shared = random_blocks([number, *(same.expand(600) for _ in range(3))], [5])
    assert torch.equal(shared, random_blocks([number, *(same.repeat(600) for _ in range(3))], [5]))


@EVERY_DISTRIBUTION
@MANY
@given(start=st.integers(0, 2**36), length=st.integers(0, 2500))
def test_a_slice(chosen: None, distribution: Elementwise, start: int, length: int) -> None:
    values = torch.empty(length, device=DEVICE)
    found = distribution.draw_slice(STREAM, "w", start, values)
    assert found.dtype == torch.float32
    assert torch.equal(found.cpu(), draw_slice(STREAM, "w", start, start + length, distribution))


@EVERY_DISTRIBUTION
@MANY
@given(shapes=st.lists(st.lists(st.integers(1, 20), max_size=3), min_size=1, max_size=5), count=st.integers(1, 3))
def test_a_layout(chosen: None, distribution: Elementwise, shapes: list[list[int]], count: int) -> None:
    named = {f"tensor.{i}": torch.Size(shape) for i, shape in enumerate(shapes)}
    streams = [Stream(3, 4, direction) for direction in range(count)]
    found = distribution.draw_layouts(streams, NoiseLayout(named, DEVICE), {})
    expected = NoiseLayout(named, torch.device("cpu")).draw_all(streams, distribution)
    assert torch.equal(torch.stack(list(found)).cpu(), expected)


@EVERY_DISTRIBUTION
@pytest.mark.parametrize("columns", [7, 128, 130])
def test_rows(chosen: None, distribution: Elementwise, columns: int) -> None:
    rows = torch.tensor([[4, 0], [2, 4]], device=DEVICE)
    found = distribution.draw_rows(STREAM, "w", rows, torch.empty(5, columns, device=DEVICE))
    assert torch.equal(found.cpu(), draw_rows(STREAM, "w", rows.cpu(), columns, distribution))


def test_what_torch_decodes(chosen: None) -> None:
    """The bits of rounding, with an element in the middle of a block and beyond the range of 32 bits."""
    start = 2**35 + 5
    found = draw_half_words(STREAM, "w", start, start + 900, DEVICE)
    blocks = [(start // 8 + i) for i in range(114)]
    tensor, key = tensor_key("w"), STREAM.key
    bits = [
        word >> shift & 0xFFFF
        for block in blocks
        for word in philox_on_integers(
            (block % 2**32, block >> 32, tensor % 2**32, tensor >> 32), (key % 2**32, key >> 32)
        )
        for shift in (0, 16)
    ]
    assert found.tolist() == bits[start % 8 :][:900]
