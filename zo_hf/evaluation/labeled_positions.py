"""Logits only at the positions that predict a label, known without a wait for the device.

The number of these positions sets the shape of the logits, so the host must know it before the forward pass. If the
labels are on a device, the host waits there for them. A batch that has not been moved yet can be asked on the host.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from zo_hf.evaluation.known_losses import IGNORED


def labeled_positions(labels: Tensor, on_host: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """Return the positions that any row needs, and the tokens that they predict.

    Args:
        labels: int64 (rows, length); the label at t + 1 is predicted at t.
        on_host: the same labels on the CPU, if they are there as well.

    Returns:
        int64 (positions,) and int64 (rows, positions), on the device of `labels`; None if there are no labels, or if more
        than half of the positions carry one.
    """
    known = labels if on_host is None else on_host
    needed = (_shifted(known) != IGNORED).any(0).nonzero().flatten()
    if not 0 < len(needed) <= labels.shape[1] // 2:
        return None
    positions = needed if needed.device == labels.device else _made_on(labels.device, needed.tolist())
    return positions, _shifted(labels)[:, positions].contiguous()


def _shifted(labels: Tensor) -> Tensor:
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def _made_on(device: torch.device, numbers: list[int]) -> Tensor:
    """Make ascending numbers on a device, int64 (n,): runs of them take no copy from the host, for which it would wait."""
    ends = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1), len(numbers)]
    runs = [torch.arange(numbers[i], numbers[j - 1] + 1, device=device) for i, j in pairwise(ends)]
    return runs[0] if len(runs) == 1 else torch.cat(runs)
