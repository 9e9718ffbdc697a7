"""The device that does not exist: what counts as a launch, a read and an upload there, and that devices do not mix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.fake_cuda import CUDA, fake_cuda


def _ones(*shape: int) -> Tensor:
    return torch.ones(*shape, device=CUDA)


@pytest.mark.parametrize(
    ("action", "launches", "reads", "uploads"),
    [
        (lambda x: x + 1, 1, 0, 0),
        (lambda x: x @ x, 1, 0, 0),
        (lambda x: x.view(-1, 1).expand(16, 3).t()[0, 2:], 0, 0, 0),
        (lambda x: torch.empty_like(x), 0, 0, 0),
        (lambda x: x.sum().item(), 1, 1, 0),
        (lambda x: x.tolist(), 0, 1, 0),
        (lambda x: bool((x > 0).all()), 2, 1, 0),
        (lambda x: x.nonzero(), 1, 1, 0),
        (lambda x: x.cpu(), 0, 1, 0),
        (lambda x: torch.tensor([1.0, 2.0], device=CUDA), 0, 0, 1),
        (lambda x: torch.full((), 2.0, device=CUDA), 1, 0, 0),
        (lambda x: x[[0, 1]], 1, 0, 1),
        (lambda x: torch._foreach_add_([x, x.t()], [1.0, 2.0]), 1, 0, 0),
        (lambda x: torch._foreach_copy_(list(x.expand(65, 4, 4).clone().unbind()), [x] * 65), 3, 0, 0),
        (lambda x: torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None]), 1, 0, 0),
        (lambda x: torch.zeros(3).sum().item(), 0, 0, 0),
    ],
)
def test_counts(action: Callable[[Tensor], Any], launches: int, reads: int, uploads: int) -> None:
    with fake_cuda() as counts:
        x = _ones(4, 4)
        counts.clear()
        action(x)
        assert counts.total == (launches, reads, uploads), counts


def test_devices_do_not_mix() -> None:
    with fake_cuda(), pytest.raises(RuntimeError, match="device"):
        _ones(3) + torch.ones(3)


def test_tensors_on_the_cpu_keep_their_values() -> None:
    with fake_cuda():
        x = torch.arange(4)
        assert (x * 2).tolist() == [0, 2, 4, 6]
        assert _ones(3).device == CUDA
