"""The choice between kernels and torch's own operations.

It is one for the process, as torch's own switches of backends are. Every engine sets it when it begins to evaluate losses and when it
applies an estimate. Noise has the same bits both ways. Every kernel says how far its results are from those of torch.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch

logger = logging.getLogger(__name__)

#: "auto" takes kernels for tensors on CUDA if Triton is installed and works.
CHOICES = ("auto", "torch", "triton")

#: What Philox4x32-10 makes of counter 0 and key 0, from the vectors that its authors publish.
_KNOWN = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)

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
    if choice == "triton":
        _check(device)
    _chosen = choice


def run_on(device: torch.device) -> bool:
    """Return whether kernels compute on a device."""
    return would_run_on(device, _chosen)


def would_run_on(device: torch.device, choice: str) -> bool:
    """Return whether kernels would compute on a device with one of `CHOICES`."""
    if choice == "torch" or not is_installed():
        return False
    if device.type == "cpu":
        return choice == "triton" and is_interpreted()
    return device.type == "cuda" and why_not_on(device) is None


@cache
def is_installed() -> bool:
    """Return whether Triton can be imported."""
    return find_spec("triton") is not None


def is_interpreted() -> bool:
    """Return whether Triton runs kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def why_not_on(device: torch.device) -> str | None:
    """Return why kernels do not run on a device, after a trial of one, and warn; None if they do."""
    reason = _failure(device)
    if reason is not None:
        logger.warning("Triton's kernels do not run on %s, and torch takes their place (%s).", device, reason)
    return reason


def _failure(device: torch.device) -> str | None:
    # The tiles of a product need the shared memory of newer GPUs.
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "its compute capability is below 8.0"
    from zo_hf.kernels.random_blocks import random_blocks

    try:
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        words = random_blocks([zero] * 4, [0]).view(torch.int32).flatten().tolist()
    except Exception as error:  # Triton finds no compiler, or no driver
        return f"{type(error).__name__}: {error}"
    return None if tuple(word % 2**32 for word in words) == _KNOWN else "it draws other numbers than it should"


def _check(device: torch.device) -> None:
    """Raise a ValueError, see `choose`, if kernels cannot run on a device."""
    if not is_installed():
        raise ValueError(
            "zo_kernels='triton' needs Triton, which is not installed; use zo_kernels='auto', or pip install "
            "'zo_hf[kernels]'."
        )
    if device.type != "cuda" and not (device.type == "cpu" and is_interpreted()):
        raise ValueError(
            f"zo_kernels='triton' needs weights on a CUDA device, and they are on {device.type}; use zo_kernels='auto', or "
            "set TRITON_INTERPRET=1 to try the kernels on the CPU, slowly."
        )
    reason = why_not_on(device)
    if reason is not None:
        raise ValueError(f"zo_kernels='triton' does not run on {device} ({reason}); use zo_kernels='torch'.")
