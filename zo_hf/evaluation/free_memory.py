"""The memory that a device has left for probes in one batch, where it can say so: CUDA.

A forward pass that fails for lack of memory is repeated one probe at a time. It is better not to try it in every step
with a batch as large as the first one.
"""

from __future__ import annotations

import torch


def can_say(device: torch.device) -> bool:
    """Return whether a device tells how much memory it has left."""
    return device.type == "cuda"


def watch(device: torch.device) -> None:
    """Begin to note the most memory in use; this begins torch's own statistic of the device anew."""
    if can_say(device):
        torch.cuda.reset_peak_memory_stats(device)


def why_too_large(device: torch.device, copies: int) -> str | None:
    """Return why a forward pass over `copies` of a batch will not fit, or None if it may.

    Since `watch`, there has been a forward pass over a single copy.
    """
    if not can_say(device):
        return None
    held = torch.cuda.memory_allocated(device)
    needed = copies * (torch.cuda.max_memory_allocated(device) - held)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
    return None if needed <= free else f"it needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
