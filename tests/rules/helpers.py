"""What the tests of rules share: an engine with a rule, and small losses whose derivatives are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import seeded
from tests.subspaces.helpers import sgd
from zo_hf.directions import GAUSSIAN
from zo_hf.engine import ZerothOrder
from zo_hf.estimators import ESTIMATORS
from zo_hf.rng import Stream, draw_slice
from zo_hf.rules import RULES
from zo_hf.subspaces import subspace_kind

# Of a rule that has a period, one that is as short as the folds here.
SHORT: dict[str, dict[str, Any]] = {"svrg": {"svrg_batches": 1, "svrg_steps": 1}}
EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))


def estimator_for(rule: str) -> str:
    """The estimator that the rule needs, or the usual one."""
    return next(iter(RULES[rule].needs_estimator), "two_point")


def options_of(rule: str, every: bool = False) -> dict[str, Any]:
    """What a run with the rule sets in its `ZOConfig`.

    Args:
        every: set the rule's own options too, each away from its default.
    """
    set_to = {"zo_momentum": 0.5, "zo_momentum_at_fold": "reset", "zo_spectral_rank": 1, "zo_curvature_rate": 1e-2}
    set_to |= {"zo_cocd_decay": 0.5, "zo_cocd_memory": 4, "zo_svrg_batches": 2, "zo_svrg_steps": 2}
    chosen = {f"zo_{name}": set_to[f"zo_{name}"] for name in RULES[rule].uses} if every else {}
    if rule in SHORT:
        chosen = {f"zo_{name}": value for name, value in SHORT[rule].items()} | chosen | {"zo_fold_steps": 4}
    return {"zo_rule": rule, "zo_estimator": estimator_for(rule), "zo_num_directions": 2} | chosen


class Quadratic(nn.Module):
    """½ Σ aᵢ·(xᵢ - 1)², a separable loss whose curvature is a.

    Args:
        curvature: a, of the shape of x.
    """

    def __init__(self, curvature: Tensor) -> None:
        super().__init__()
        self.curvature = curvature
        self.x = nn.Parameter(torch.zeros_like(curvature))

    def forward(self) -> Tensor:
        return 0.5 * (self.curvature * (self.x - 1).square()).sum()


def linear_task() -> tuple[nn.Module, Callable[[], Tensor]]:
    """A matrix and a bias, and their squared distance from those of another layer, as 32 random inputs see it."""
    model, best = seeded(lambda: nn.Linear(6, 3)), seeded(lambda: nn.Linear(6, 3), seed=1)
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    target = best(x).detach()
    return model, lambda: (model(x) - target).square().mean()


def engine(
    model: nn.Module,
    rule: str,
    lr: float = 1e-2,
    subspace: str = "low_rank",
    options: Mapping[str, Any] | None = None,
    fold_steps: int = 8,
    rank: int = 2,
    **kwargs: Any,
) -> tuple[ZerothOrder, torch.optim.Optimizer]:
    """An engine with a rule and plain descent.

    Args:
        options: of the rule.
    """
    shape = {"rank": rank, "fold_steps": fold_steps} if subspace in ("low_rank", "core") else {}
    kwargs = {"num_directions": 4, "estimator": estimator_for(rule)} | kwargs
    kind = subspace_kind(subspace, held=ESTIMATORS[kwargs["estimator"]].along_coordinates)
    zo = ZerothOrder(
        model,
        kind(model, seed=kwargs.get("seed", 0), **shape),
        rule=rule,
        **(SHORT.get(rule, {}) | dict(options or {})),
        **kwargs,
    )
    return zo, sgd(zo, lr)


def steps(zo: ZerothOrder, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], count: int) -> list[float]:
    """Take some steps; returns the losses they reported."""
    losses = []
    for _ in range(count):
        losses.append(zo.estimate(loss).loss)
        optimizer.step()
    return losses


def gradients(zo: ZerothOrder) -> dict[str, Tensor]:
    """Copies of what the torch optimizer is about to get."""
    return {name: c.grad.clone() for name, c in zo.subspace.coordinates.items() if c.grad is not None}


def estimate_written_out(zo: ZerothOrder, coefficients: list[float]) -> dict[str, Tensor]:
    """Σᵢ coefficientᵢ·zᵢ at the engine's step, with z drawn tensor by tensor, float64."""
    total: dict[str, Tensor] = {}
    for name, coordinate in zo.subspace.coordinates.items():
        total[name] = torch.zeros(coordinate.shape, dtype=torch.float64)
        for index, coefficient in enumerate(coefficients):
            z = draw_slice(Stream(zo.seed, zo.step, index), name, 0, coordinate.numel(), GAUSSIAN)
            total[name] += coefficient * z.view(coordinate.shape).double()
    return total
