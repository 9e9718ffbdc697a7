"""Every kernel compiles to the machine code of a GPU, and needs no more shared memory than small ones have."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

#: Bytes that a program may have on GPUs of compute capability 8.6 and 8.9.
SHARED = 99 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability: int, tmp_path: object) -> None:
    """In a process of its own, because Triton chooses the interpreter for a process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_all", str(capability)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 1 + 4 + 3 * 6
    assert all(int(shared) <= SHARED for _, _, shared in lines)
