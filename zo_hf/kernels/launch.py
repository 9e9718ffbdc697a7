"""Launching a kernel, and handing it numbers."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of its tensors, which need not be the current one.

    Args:
        kernel: a function that Triton compiles.
        programs: number of its programs along each axis.
        arguments: its arguments, a tensor among them.
        options: its compile-time constants, and options of Triton.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    # A product and a sum that Triton joined would round once, where torch rounds twice. `tl.fma` joins them where torch does.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[programs](*arguments, enable_fp_fusion=False, **options)


@lru_cache(maxsize=64)
def on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Put numbers into a tensor, (numbers,), which nobody may write to, without a copy for which the host would wait."""
    found = torch.zeros(len(numbers), dtype=dtype, device=device)
    # Scalars of a foreach operation are arguments of a kernel.
    torch._foreach_add_(list(found.unbind()), list(numbers))
    return found


def signed(key: int) -> int:
    """Return the number from -2**63 to 2**63 - 1 that has the 64 bits of a key."""
    return key - (key >> 63 << 64)
