"""A torch optimizer in the terms of stability theory: its momentum and its preconditioner.

    SGD      m ← β·m + (1 - dampening)·g          x ← x - η·m
    Adam     m ← β₁·m + (1 - β₁)·g                x ← x - η·P⁻¹·m,  P = (1 - β₁ᵗ⁺¹)·(√v̂ + ε)

These forms are those of arXiv 2604.14669, which assumes a constant P. Here P is taken from the last step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zo_hf.rules import SeededSGD

#: Both classes, because AdamW is a subclass of Adam in some versions of torch only.
ADAM = (torch.optim.Adam, torch.optim.AdamW)


@dataclass(frozen=True)
class Descent:
    """The form of an optimizer's step.

    Args:
        momentum: β.
        ema: True if the momentum is a moving average, which multiplies the new gradient by 1 - β.
        factor: a further factor of the learning rate.
        divides: True if the step is divided by a diagonal P, see `AdamPreconditioner`.
    """

    momentum: float = 0.0
    ema: bool = False
    factor: float = 1.0
    divides: bool = False


def descent_of(optimizer: Optimizer) -> Descent:
    """Return the form of an optimizer's step.

    Raises:
        ValueError: the theory does not cover this optimizer; the message says what to use instead.
    """
    kinds = {_descent(optimizer, group) for group in optimizer.param_groups}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(
            f"zo_stability_steps knows no critical learning rate of this {type(optimizer).__name__}; use optim='sgd' "
            "without nesterov or 'adamw_torch' without amsgrad, with the same options in all parameter groups, or leave "
            "zo_stability_steps out."
        )
    (descent,) = kinds
    assert descent is not None
    return descent


def _descent(optimizer: Optimizer, group: Mapping[str, Any]) -> Descent | None:
    if isinstance(optimizer, SeededSGD):
        return Descent()
    if group.get("maximize"):
        return None
    if type(optimizer) is torch.optim.SGD and not group["nesterov"]:
        factor = 1.0 - group["dampening"] if group["momentum"] else 1.0
        return Descent(group["momentum"], factor=factor)
    if type(optimizer) in ADAM and not group["amsgrad"]:
        return Descent(float(group["betas"][0]), ema=True, divides=True)
    return None


@dataclass(frozen=True)
class AdamPreconditioner:
    """The diagonal P of Adam's next step, see `zo_hf.evaluation.curvature_probes.Preconditioner`.

    Args:
        optimizer: Adam or AdamW.
        coordinates: the tensors that the optimizer moves, by name.
    """

    optimizer: Optimizer
    coordinates: Mapping[str, Tensor]

    def exists(self) -> bool:
        """Return whether Adam has made a step."""
        return any(self.optimizer.state.get(p) for group in self.optimizer.param_groups for p in group["params"])

    @torch.no_grad()
    def inverse_root(self) -> dict[str, Tensor]:
        """Return P^-½ for every coordinate tensor, by name; zeros for tensors that Adam has not moved yet."""
        names = {id(coordinate): name for name, coordinate in self.coordinates.items()}
        roots: dict[str, Tensor] = {}
        for group in self.optimizer.param_groups:
            beta1, beta2 = (float(beta) for beta in group["betas"])
            for parameter in group["params"]:
                state, name = self.optimizer.state.get(parameter), names[id(parameter)]
                if not state:
                    roots[name] = torch.zeros_like(parameter)
                    continue
                steps = float(state["step"])
                mean_square = state["exp_avg_sq"] / (1.0 - beta2**steps)
                divisor = (mean_square.sqrt() + group["eps"]) * (1.0 - beta1 ** (steps + 1))
                roots[name] = divisor.rsqrt()
        return roots
