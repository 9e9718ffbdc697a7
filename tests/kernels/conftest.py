"""Kernels in Triton's interpreter, or on the GPU that `ZO_HF_TEST_DEVICE=cuda` names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.methods.table import DEVICE
from zo_hf import kernels
from zo_hf.kernels.choice import is_installed


@pytest.fixture
def chosen() -> Iterator[None]:
    """Make kernels run until the test ends."""
    kernels.choose("triton", DEVICE)
    yield
    kernels.choose("auto", DEVICE)


@pytest.fixture(scope="session", autouse=True)
def _rounds_once() -> Iterator[None]:
    """Let the interpreter's fma round once, as those of torch and of a GPU do; before Triton 3.9 it rounds twice."""
    if not is_installed():
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", _fma)
        yield


def _fma(_: Any, x: Any, y: Any, z: Any) -> Any:
    return type(z)(fma(x.data, y.data, z.data), z.dtype.scalar)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return x · y + z of float32 numbers, rounded once, float32."""
    x, y, z = (np.asarray(part, np.float64) for part in (x, y, z))
    with np.errstate(invalid="ignore"):
        product = np.atleast_1d(x * y)  # exact
        total = product + z
        part = total - product
        error = (product - (total - part)) + (z - part)
    # Rounded to odd in float64, where the last bit then says that something is missing, the sum rounds right to float32.
    bits = total.view(np.int64)
    away = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where(np.isfinite(error) & (error != 0) & (bits % 2 == 0), bits + away, bits)
    return odd.view(np.float64).astype(np.float32).reshape(np.broadcast_shapes(x.shape, y.shape, z.shape))
