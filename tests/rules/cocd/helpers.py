"""The recursion written a second time, over one flat vector, and small problems to run both on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from tests.conftest import seeded
from zo_hf.engine import ZerothOrder


def network() -> nn.Module:
    """17 parameters: linear layers with biases, of which one is not a multiple of anything."""
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1, bias=True), nn.Linear(1, 1, bias=False))


N = 17


def regression(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model, and its squared error on inputs whose targets another network of the same kind made."""
    model, teacher = seeded(network, dtype, seed), seeded(network, dtype, seed + 1)
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        target = 3 * teacher(x)
    return model, lambda: (model(x) - target).square().mean()


class Quadratic(nn.Module):
    """½ wᵀ H w around zero; each half of w belongs to a parameter of its own.

    Args:
        hessian: H, (2h, 2h).
    """

    def __init__(self, hessian: Tensor, start: Tensor) -> None:
        super().__init__()
        half = len(start) // 2
        self.hessian = hessian
        self.first, self.second = Row(start[:half]), Row(start[half:])

    def forward(self) -> Tensor:
        one = torch.ones(1, dtype=self.hessian.dtype)
        w = torch.cat((self.first(one), self.second(one)))
        return 0.5 * w @ self.hessian @ w


class Row(nn.Module):
    """A parameter that is read in the forward of a module, as the engine needs it."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def cocd(
    model: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    per_step: int,
    decay: float,
    lr: float | Sequence[float],
    eps: float,
    memory: int | None = None,
    forward: bool = False,
    order: Sequence[int] | None = None,
) -> list[Tensor]:
    """Iterates of the paper's loop: write, evaluate, put the saved value back; G a dictionary of the freshest entries."""
    w = parameters_to_vector(model.parameters()).detach().clone()
    n = len(w)
    kept: dict[int, float] = {}  # insertion order is age
    rates = [lr] * steps if isinstance(lr, int | float) else lr
    iterates, pointer = [], 0

    def at(point: Tensor) -> float:
        vector_to_parameters(point, model.parameters())
        with torch.no_grad():
            return float(loss())

    for rate in rates:
        kept = {k: decay * g for k, g in kept.items()}
        clean = at(w)
        for _ in range(per_step):
            k = pointer % n if order is None else order[pointer % n]
            plus, minus = w.clone(), w.clone()
            plus[k] += eps
            minus[k] -= eps
            kept.pop(k, None)
            kept[k] = (at(plus) - clean) / eps if forward else (at(plus) - at(minus)) / (2 * eps)
            pointer += 1
        while len(kept) > (n if memory is None else memory):
            kept.pop(next(iter(kept)))
        w = w.clone()
        for k, g in kept.items():
            w[k] -= rate * g
        iterates.append(w)
    vector_to_parameters(iterates[-1], model.parameters())
    return iterates


def run(
    model: nn.Module, loss: Callable[[], Tensor], steps: int, per_step: int, lr: float, **options: Any
) -> tuple[ZerothOrder, list[Tensor]]:
    """The engine with torch's SGD over all weights; returns it, unfinished, and its iterates."""
    options = {"subspace": "full", "estimator": "coordinate", "rule": "cocd", "eps": 1e-2} | options
    zo = ZerothOrder(model, num_directions=per_step, **options)
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=lr))
    iterates = []
    for _ in range(steps):
        zo.estimate(loss)
        optimizer.step()
        iterates.append(parameters_to_vector(model.parameters()).detach().clone())
    return zo, iterates
