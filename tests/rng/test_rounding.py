"""Stochastic rounding: unbiased, to one of the two neighbors, and the identity on what is representable."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zo_hf.rng import Purpose, Stream
from zo_hf.rng.rounding import draw_uniform, stochastic_round

EVERY_HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
ALL_BITS = torch.arange(2**16, dtype=torch.int32)
FLOAT = {
    torch.bfloat16: st.floats(-(2.0**100), 2.0**100, width=32),
    # float16 ends at 65504 and is subnormal below 2**-14 = 6.1e-5.
    torch.float16: st.one_of(st.floats(-65000, 65000, width=32), st.floats(-(2.0**-13), 2.0**-13, width=32)),
}


def every_outcome(value: float, dtype: torch.dtype) -> Tensor:
    """What a float32 value becomes for each of the 65,536 random numbers."""
    return stochastic_round(torch.full((2**16,), value), dtype, ALL_BITS)


def neighbors(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The largest representable number not above, and the smallest not below a float32 value."""
    exact = torch.tensor(value)
    near = exact.to(dtype)
    away = torch.tensor(float("inf") if near.float() < exact else -float("inf"), dtype=dtype)
    other = near if near.float() == exact else torch.nextafter(near, away)
    return min(near.item(), other.item()), max(near.item(), other.item())


@EVERY_HALF
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_outcome_is_a_neighbor_and_their_mean_is_the_value(dtype: torch.dtype, data: st.DataObject) -> None:
    value = data.draw(FLOAT[dtype])
    outcomes = every_outcome(value, dtype).double()
    low, high = neighbors(value, dtype)
    assert set(outcomes.unique().tolist()) <= {low, high}
    # The probability of either is a multiple of 2**-16, or for float16's normal numbers of 2**-13, and then exact.
    assert outcomes.mean().item() == pytest.approx(value, abs=(high - low) * 2.0**-16)


@EVERY_HALF
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-15, 2.0**-24], ids=["normal", "subnormal", "smallest"])
def test_drawn_bits_round_without_bias(dtype: torch.dtype, sign: float, scale: float) -> None:
    """With bits from the generator the mean of many roundings is the value, within four standard errors."""
    count = 200_000
    value = sign * 1.001 * scale
    values = torch.full((count,), value)
    uniform = draw_uniform(Stream(3, purpose=Purpose.ROUNDING), "w", 0, count, torch.device("cpu"))
    rounded = stochastic_round(values, dtype, uniform).double()
    low, high = neighbors(values[0].item(), dtype)
    up = (values[0].item() - low) / (high - low)
    assert 0 < up < 1
    error = (high - low) * (up * (1 - up) / count) ** 0.5
    assert rounded.mean().item() == pytest.approx(values[0].item(), abs=4 * error)


@EVERY_HALF
def test_representable_values_stay_whatever_the_bits(dtype: torch.dtype) -> None:
    """All 65,536 bit patterns: normal, subnormal, both zeros with their sign, infinities."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    patterns = patterns[~patterns.isnan()]
    for bits in (0, 1, 2**15, 2**16 - 2, 2**16 - 1):
        rounded = stochastic_round(patterns.float(), dtype, torch.full(patterns.shape, bits, dtype=torch.int32))
        assert torch.equal(rounded.view(torch.int16), patterns.view(torch.int16)), bits


@EVERY_HALF
def test_non_finite_values_stay(dtype: torch.dtype) -> None:
    values = torch.tensor([float("inf"), -float("inf"), float("nan")])
    for bits in (0, 2**16 - 1):
        rounded = stochastic_round(values, dtype, torch.full((3,), bits, dtype=torch.int32))
        assert rounded[:2].tolist() == values[:2].tolist()
        assert rounded[2].isnan()


@EVERY_HALF
def test_the_shape_is_kept_and_nothing_is_written(dtype: torch.dtype) -> None:
    values = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    before = values.clone()
    uniform = draw_uniform(Stream(0, purpose=Purpose.ROUNDING), "w", 0, 60, values.device).view(3, 4, 5)
    rounded = stochastic_round(values, dtype, uniform)
    assert rounded.shape == values.shape and rounded.dtype == dtype
    assert torch.equal(values, before)


def test_float32_is_a_plain_cast() -> None:
    values = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stochastic_round(values, torch.float32, torch.zeros(8, dtype=torch.int32)), values.float())
