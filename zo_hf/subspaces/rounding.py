"""Stochastic rounding to half precision, with bits from the counter-based generator.

A value between two representable neighbours becomes one of them with probability proportional to its distance from the
other, so the expectation is exact and updates far below half an ulp survive on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zo_hf.directions import Stream, draw_half_words

# Elements rounded at a time, so that the float32 copy of a large weight is never whole.
TILE = 1 << 20


def stochastic_round(values: Tensor, dtype: torch.dtype, uniform: Tensor) -> Tensor:
    """`values` in `dtype`, rounded stochastically.

    Args:
        values: float32, any shape.
        dtype: torch.bfloat16 or torch.float16; any other dtype is a plain cast.
        uniform: int32 in [0, 2**16), the shape of `values`.
    """
    if dtype == torch.bfloat16:
        rounded = _drop_low_bits(values, uniform, 16)
    elif dtype == torch.float16:
        # Below 2**-14 a float16 is a multiple of 2**-24; above, it has 13 mantissa bits less than a float32.
        multiple = values.abs() * 2.0**24
        whole = multiple.floor()
        up = multiple - whole > (uniform.float() + 0.5) * 2.0**-16
        subnormal = torch.copysign((whole + up) * 2.0**-24, values)
        rounded = torch.where(values.abs() < 2.0**-14, subnormal, _drop_low_bits(values, uniform >> 3, 13))
    else:
        return values.to(dtype)
    return torch.where(values.isfinite(), rounded, values).to(dtype)


def _drop_low_bits(values: Tensor, uniform: Tensor, bits: int) -> Tensor:
    """Adds a random fraction of the last kept bit, then clears the `bits` below it."""
    mask = -(1 << bits)
    return (values.view(torch.int32) + uniform).bitwise_and_(mask).view(torch.float32)


def draw_uniform(stream: Stream, name: str, start: int, stop: int, device: torch.device) -> Tensor:
    """The 16 random bits per element that `stochastic_round` takes, int32 of shape (stop - start,)."""
    return draw_half_words(stream, name, start, stop, device)
