"""A loss that another process computes: a stage of a pipeline ends its forward pass when it has sent its activations on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class PassedOn(Exception):
    """Ends a forward pass of a stage that has sent its activations on, and does not wait for the outputs."""


def loss_or_zeros(
    loss: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a loss, or zeros in its place if a later stage computes it; the ranks exchange losses at the end of a step.

    Args:
        loss: evaluates the model.
        shape: the shape of the loss.
        dtype: its dtype.
        device: its device.
    """
    try:
        return loss()
    except PassedOn:
        return torch.zeros(shape, dtype=dtype, device=device)
