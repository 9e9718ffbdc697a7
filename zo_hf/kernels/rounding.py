"""Stochastic rounding inside a kernel. Reference: `zo_hf.rng.rounding.stochastic_round`, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def stochastic_round(values, uniform, dtype: tl.constexpr):
    """Round float32 (n,) to a half precision by random bits, int32 (n,) in [0, 2**16); to any other dtype only cast."""
    if dtype == tl.bfloat16:
        rounded = _drop_low_bits(values, uniform, 16)
    elif dtype == tl.float16:
        # Below 2**-14 a float16 is a multiple of 2**-24; above, it has 13 fewer mantissa bits than a float32.
        size = tl.abs(values)
        multiple = size * 16777216.0
        whole = tl.floor(multiple)
        up = multiple - whole > (uniform.to(tl.float32) + 0.5) * 1.52587890625e-05
        subnormal = (whole + up.to(tl.float32)) * 5.9604644775390625e-08
        sign = values.to(tl.int32, bitcast=True) & -2147483648
        signed = (subnormal.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        rounded = tl.where(size < 6.103515625e-05, signed, _drop_low_bits(values, uniform >> 3, 13))
    else:
        rounded = values
    is_finite = tl.abs(values) < float("inf")
    return tl.where(is_finite, rounded, values).to(dtype)


@triton.jit
def _drop_low_bits(values, uniform, bits: tl.constexpr):
    """Add a random fraction of the last bit that is kept, then clear the `bits` bits below it."""
    return ((values.to(tl.int32, bitcast=True) + uniform) & -(1 << bits)).to(tl.float32, bitcast=True)
