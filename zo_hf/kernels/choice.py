"""The choice between kernels and torch's own operations.

It is one for the process, as torch's own switches of backends are, and the engine that was made last has set it. Noise has the
same bits both ways. Every kernel says how far its results are from those of torch.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

#: "auto" takes kernels for tensors on CUDA if Triton is installed.
CHOICES = ("auto", "torch", "triton")

_chosen = "auto"


def choose(choice: str, device: torch.device) -> None:
    """Set what the process takes from now on.

    Args:
        choice: one of `CHOICES`.
        device: device of the weights.

    Raises:
        ValueError: "triton" cannot run on the device, or is not installed.
    """
    global _chosen
    if choice == "triton" and not is_installed():
        raise ValueError(
            "zo_kernels='triton' needs Triton, which is not installed; use zo_kernels='auto', or pip install "
            "'zo_hf[kernels]'."
        )
    if choice == "triton" and not would_run_on(device, choice):
        raise ValueError(
            f"zo_kernels='triton' needs weights on a CUDA device, and they are on {device.type}; use zo_kernels='auto', or "
            "set TRITON_INTERPRET=1 to try the kernels on the CPU, slowly."
        )
    _chosen = choice


def run_on(device: torch.device) -> bool:
    """Return whether kernels compute on a device."""
    return would_run_on(device, _chosen)


def would_run_on(device: torch.device, choice: str) -> bool:
    """Return whether kernels would compute on a device with one of `CHOICES`."""
    is_possible = device.type == "cuda" or (device.type == "cpu" and choice == "triton" and is_interpreted())
    return is_possible and choice != "torch" and is_installed()


@cache
def is_installed() -> bool:
    """Return whether Triton can be imported."""
    return find_spec("triton") is not None


def is_interpreted() -> bool:
    """Return whether Triton runs kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
