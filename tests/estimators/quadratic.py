"""A quadratic whose coordinates are its own parameter, so that every estimator has a formula to be held against."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zo_hf.directions import ELEMENTWISE, GAUSSIAN
from zo_hf.engine import ZerothOrder
from zo_hf.estimators import ESTIMATORS, Estimator
from zo_hf.rng import Stream, draw_slice
from zo_hf.subspaces import LowRank

DIMENSION = 7
# Those along single coordinates are held against their formula in tests/cocd.
ALONG_NOISE = {name: kind for name, kind in ESTIMATORS.items() if not kind.along_coordinates}
EVERY_ESTIMATOR = pytest.mark.parametrize("estimator", ALONG_NOISE)
EVERY_DIRECTION = pytest.mark.parametrize("direction", ELEMENTWISE)


class Quadratic(nn.Module):
    """½ (x - m)ᵀ H (x - m) + gᵀ x + 3 of its parameter x, float64.

    Args:
        curvature: multiplies H; 0 leaves a linear loss.
    """

    def __init__(self, curvature: float = 1.0, slope: float = 1.0, dimension: int = DIMENSION) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        root, minimum, g, x = torch.randn(dimension + 3, dimension, generator=generator, dtype=torch.float64).split(
            [dimension, 1, 1, 1]
        )
        self.register_buffer("hessian", curvature * (root @ root.t() / dimension + torch.eye(dimension).double()))
        self.register_buffer("minimum", minimum[0])
        self.register_buffer("slope", slope * g[0])
        self.x = nn.Parameter(x[0].clone())

        self.ripple = 0.0

    def forward(self) -> Tensor:
        return self.at(self.x)

    def at(self, x: Tensor) -> Tensor:
        """The loss at x, (dimension,), or at several, (n, dimension); with `ripple` times a sine on top."""
        away = x - self.minimum
        return ((away @ self.hessian) * away).sum(-1) / 2 + x @ self.slope + 3 + self.ripple * x.sin().sum(-1)

    def gradient(self) -> Tensor:
        """Its gradient at the parameter, by the formula."""
        return self.hessian @ (self.x.detach() - self.minimum) + self.slope


def engine(model: nn.Module, estimator: str, num_directions: int = 2, **options: Any) -> ZerothOrder:
    """An engine whose coordinates are the model's one parameter, apart from it and never folded."""
    options = {"eps": 1e-3, "seed": 5} | options
    space = LowRank(model, 1, 0, seed=options["seed"])
    return ZerothOrder(
        model, space, estimator=estimator, num_directions=num_directions, batched_probes=False, **options
    )


def directions(
    count: int, step: int = 0, name: str = "x", size: int = DIMENSION, distribution: Any = GAUSSIAN
) -> Tensor:
    """z of every direction of a step of `engine`, (count, size), float64."""
    return torch.stack([draw_slice(Stream(5, step, i), name, 0, size, distribution) for i in range(count)]).double()


def numbers(estimator: Estimator, model: Quadratic, z: Tensor) -> Tensor:
    """c that the estimator makes of the losses at its probes along z, (q, DIMENSION); (q,)."""
    return torch.tensor(every_number(estimator, model, z)[: estimator.num_directions], dtype=torch.float64)


def every_number(estimator: Estimator, model: Quadratic, z: Tensor) -> list[float]:
    """All that the estimator makes of these losses."""
    x, probes = model.x.detach(), estimator.probes()
    points = torch.stack([x + probe.scale * z[probe.direction] for probe in probes])
    slopes = z @ model.gradient()
    losses = [
        slopes[probe.direction] if probe.derivative else loss
        for probe, loss in zip(probes, model.at(points), strict=True)
    ]
    return estimator.projected_gradients([float(loss) for loss in losses])


def drawn(direction: str, *shape: int) -> Tensor:
    """Directions of the named distribution, float64, from torch's own generator."""
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    return z.sign() if direction == "rademacher" else z
