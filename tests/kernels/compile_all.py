"""Compile every kernel for a GPU that is not there: `python -m tests.kernels.compile_all 90` for compute capability 9.0.

It prints a line for each: the kernel, the dtype, and the bytes of shared memory of a program. Triton brings the assembler.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from zo_hf.directions import GAUSSIAN
from zo_hf.kernels import launch

CPU = torch.device("cpu")


class NoDriver:
    """What the compiler asks a driver for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(kernel: Any, programs: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    compiled = kernel.warmup(*arguments, grid=programs, enable_fp_fusion=False, **options)
    assert compiled.asm["cubin"]
    dtype = next(argument.dtype for argument in arguments if isinstance(argument, torch.Tensor))
    print(kernel.fn.__name__, dtype, compiled.metadata.shared, flush=True)


def main(capability: int) -> None:
    """Call every function that launches a kernel, with a launch that only compiles it."""
    driver.set_active(NoDriver(capability))
    launch.launch = _compile
    from zo_hf.kernels.fold import fold
    from zo_hf.kernels.layout_noise import layout_noise
    from zo_hf.kernels.low_rank_product import add_low_rank_product
    from zo_hf.kernels.moved_norm import moved_norm
    from zo_hf.kernels.perturbed_linear import perturbed_linear
    from zo_hf.kernels.random_blocks import random_blocks
    from zo_hf.kernels.seeded_update import seeded_update
    from zo_hf.kernels.slice_noise import slice_noise

    number = torch.arange(2048)
    random_blocks([number] * 4, [1, 2])
    for table in (GAUSSIAN.table(CPU), None):
        slice_noise(1, 2, 5, 999, table, CPU)
        layout_noise(number, number, number, [1, 2], table)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for table in (GAUSSIAN.table(CPU, dtype), None):
            seeded_update(torch.zeros(5000, dtype=dtype), 1, [2, 3], [0.1, 0.2], 1.0, 4, table)
        fold(torch.zeros(64, 48, dtype=dtype), torch.zeros(64, 4), torch.zeros(48, 4), 1.0, 1, 2, 0)
        x, weight = torch.zeros(2, 64, 128, dtype=dtype), torch.zeros(256, 128, dtype=dtype)
        perturbed_linear(x, weight, weight[:, 0].contiguous(), (1, 2), [3, 3], [0.1, -0.1])
        rows, factors = x.view(128, 128), torch.zeros(2, 256, 8, dtype=dtype)
        add_low_rank_product(rows.new_zeros(128, 256), rows, factors[0, :128], factors, 4)
        moved_norm(rows, torch.zeros(2, 128), torch.zeros(2, 128), 1e-5, True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
