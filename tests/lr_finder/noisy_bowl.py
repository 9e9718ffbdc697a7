"""A quadratic whose batches differ, and runs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.engine import ZerothOrder
from zo_hf.subspaces import LowRank

DIMENSION = 64


class Bowl(nn.Module):
    """height + ½·h·|x|² + batch · (x - x₀) of its parameter x: batches differ in slope, and not in the loss at first."""

    def __init__(self, curvature: float, height: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.x = nn.Parameter(torch.randn(DIMENSION, generator=generator, dtype=torch.float64))
        self.register_buffer("start", self.x.detach().clone())
        self.curvature, self.height = curvature, height

    def forward(self, batch: Tensor) -> Tensor:
        return self.height + self.curvature / 2 * self.x @ self.x + batch @ (self.x - self.start)


@dataclass
class Rows:
    """The loss of a batch of rows, (rows, DIMENSION), of a `Bowl`; it comes apart by rows."""

    model: nn.Module
    batch: Tensor

    @property
    def rows(self) -> int:
        return len(self.batch)

    def __call__(self) -> Tensor:
        return self.model(self.batch).mean()

    def by_groups(self, groups: int) -> Tensor:
        return self.model(self.batch).view(groups, -1).mean(1) / groups


def square(model: nn.Module) -> float:
    """|x|²."""
    return float(model.x.detach().square().sum())


def engine(model: nn.Module, seed: int = 1, **options: Any) -> tuple[ZerothOrder, torch.optim.Optimizer]:
    """Plain SGD on two-point estimates, ready to step."""
    zo = ZerothOrder(model, LowRank(model, 1, 0, seed=1), batched_probes=False, seed=seed, **options)
    return zo, zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1.0))


def batches(zo: ZerothOrder, noise: float, seed: int = 0, rows: int = 0) -> Iterator[Callable[[], Tensor]]:
    """Batches whose gradients differ by `noise` in every coordinate, of so many rows if they are to come apart."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        batch = noise * torch.randn(max(1, rows), DIMENSION, generator=generator, dtype=torch.float64)
        yield Rows(zo.model, batch * rows**0.5) if rows else lambda batch=batch: zo.model(batch[0])


def after_training(
    rates: Sequence[float], curvature: float, noise: float, seed: int = 9, rows: int = 0, **options: Any
) -> float:
    """The loss without noise after a step of each rate."""
    zo, optimizer = engine(Bowl(curvature), seed, **options)
    source = batches(zo, noise, seed, rows)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        zo.estimate(next(source))
        optimizer.step()
    return curvature / 2 * square(zo.finish())
