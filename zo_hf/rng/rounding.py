"""Stochastic rounding to half precision, with bits from the counter-based generator.

A value between two representable neighbors becomes one of them, with a probability proportional to its distance from
the other. The expectation is therefore exact, and an update far below half an ulp survives on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zo_hf.rng.draw import draw_half_words
from zo_hf.rng.stream import Stream

# Elements rounded at a time, so that no float32 copy of a whole large weight exists.
TILE = 1 << 20


def stochastic_round(values: Tensor, dtype: torch.dtype, uniform: Tensor) -> Tensor:
    """Round `values` stochastically to `dtype`.

    Args:
        values: float32 of any shape.
        dtype: torch.bfloat16 or torch.float16. For any other dtype the function only casts.
        uniform: random bits, int32 in [0, 2**16), of the shape of `values`.

    Returns:
        A tensor of the shape of `values` in `dtype`; an infinity or a NaN stays what it is.
    """
    if dtype == torch.bfloat16:
        rounded = _drop_low_bits(values, uniform, 16)
    elif dtype == torch.float16:
        # Below 2**-14 a float16 is a multiple of 2**-24; above, it has 13 fewer mantissa bits than a float32.
        multiple = values.abs() * 2.0**24
        whole = multiple.floor()
        up = multiple - whole > (uniform.float() + 0.5) * 2.0**-16
        subnormal = torch.copysign((whole + up) * 2.0**-24, values)
        rounded = torch.where(values.abs() < 2.0**-14, subnormal, _drop_low_bits(values, uniform >> 3, 13))
    else:
        return values.to(dtype)
    return torch.where(values.isfinite(), rounded, values).to(dtype)


def round_in_tiles(value: Tensor, dtype: torch.dtype, stream: Stream, name: str) -> Tensor:
    """Round a whole tensor stochastically, some elements at a time.

    Args:
        value: float32 of any shape.
        dtype: torch.bfloat16 or torch.float16.
        stream: source of the random bits.
        name: name of the tensor, which keys them.

    Returns:
        A tensor of the shape of `value` in `dtype`.
    """
    rounded = torch.empty(value.shape, dtype=dtype, device=value.device)
    flat, target = value.reshape(-1), rounded.view(-1)
    for start in range(0, len(flat), TILE):
        stop = min(start + TILE, len(flat))
        uniform = draw_uniform(stream, name, start, stop, value.device)
        target[start:stop] = stochastic_round(flat[start:stop], dtype, uniform)
    return rounded


def _drop_low_bits(values: Tensor, uniform: Tensor, bits: int) -> Tensor:
    """Add a random fraction of the last bit that is kept, then clear the `bits` bits below it."""
    mask = -(1 << bits)
    return (values.view(torch.int32) + uniform).bitwise_and_(mask).view(torch.float32)


def draw_uniform(stream: Stream, name: str, start: int, stop: int, device: torch.device) -> Tensor:
    """Draw 16 random bits per element, as `stochastic_round` takes them: int32 of shape (stop - start,)."""
    return draw_half_words(stream, name, start, stop, device)
