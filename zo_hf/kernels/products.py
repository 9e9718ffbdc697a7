"""The dtype in which kernels multiply matrices."""

from __future__ import annotations

import torch
import triton.language as tl

from zo_hf.kernels.choice import is_interpreted


def dtype_of_products(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype of the products' factors; the interpreter holds bfloat16 as integers, and would multiply those."""
    if is_interpreted():
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
