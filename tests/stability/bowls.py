"""Losses whose Hessian is known, and engines on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.engine import ZerothOrder
from zo_hf.subspaces import LowRank


class Bowl(nn.Module):
    """½ Σ λᵢwᵢ² of its parameter w, which begins at ones, float64; called as a Trainer calls a model.

    Args:
        eigenvalues: λ, a number for all or one each.
        dimension: how many, where there is one number.
    """

    def __init__(self, eigenvalues: float | list[float] = 1.0, dimension: int = 64) -> None:
        super().__init__()
        values = [eigenvalues] * dimension if isinstance(eigenvalues, float) else eigenvalues
        self.register_buffer("eigenvalues", torch.tensor(values, dtype=torch.float64))
        self.w = nn.Parameter(torch.ones(len(values), dtype=torch.float64))

    def forward(self, x: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": 0.5 * (self.eigenvalues * self.w.square()).sum()}

    def loss(self) -> Tensor:
        return self()["loss"]


class Nothing(torch.utils.data.Dataset):
    """Rows that the loss of a `Bowl` does not depend on."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.zeros(1), "labels": torch.zeros(1)}


def engine(model: nn.Module, **options: Any) -> ZerothOrder:
    """An engine that never folds, so that its coordinates are where the model has moved to."""
    options = {"seed": 5, "batched_probes": False} | options
    return ZerothOrder(model, LowRank(model, 1, 0, seed=options["seed"]), **options)


class Net(nn.Module):
    """Two layers and a tanh, on 16 fixed rows."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 5).to(dtype), nn.Linear(5, 3).to(dtype)
            self.x, self.y = torch.randn(16, 4).to(dtype), torch.randint(0, 3, (16,))

    def forward(self) -> Tensor:
        return nn.functional.cross_entropy(self.b(torch.tanh(self.a(self.x))), self.y)


def hessian(model: nn.Module, zo: ZerothOrder) -> Tensor:
    """Of the loss in the coordinates of a low-rank or full subspace, by torch alone, float64 (d, d)."""
    from torch.func import functional_call

    subspace, named = zo.subspace, {name: p.detach().double() for name, p in model.named_parameters()}
    sizes = [coordinate.numel() for coordinate in subspace.coordinates.values()]

    def loss(flat: Tensor) -> Tensor:
        moved = dict(named)
        for (name, coordinate), part in zip(subspace.coordinates.items(), flat.split(sizes), strict=True):
            step = part.view(coordinate.shape)
            if isinstance(subspace, LowRank) and name in subspace.factored:
                step = step @ subspace.basis(name).double().t()
            moved[name] = named[name] + step
        return functional_call(model, moved)

    subspace.detach()
    x, model.x = model.x, model.x.double()
    try:
        return torch.autograd.functional.hessian(loss, torch.zeros(sum(sizes), dtype=torch.float64))
    finally:
        model.x = x
        subspace.attach()
