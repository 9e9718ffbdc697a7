"""Networks on which coordinate descent is compared with random directions, and the methods that train them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from common.resnet20 import ResNet20
from torch import nn


@dataclass(frozen=True)
class Method:
    """A method with the learning rates that are tried for it.

    Attributes:
        options: arguments of the engine.
        rates: learning rates.
        eps: distance of a probe.
        forwards: forward passes of a run.
    """

    options: Mapping[str, Any]
    rates: tuple[float, ...]
    eps: float
    forwards: int

    @property
    def along_coordinates(self) -> bool:
        return str(self.options["estimator"]).startswith("coordinate")


@dataclass(frozen=True)
class Study:
    """A network and the methods that are compared on it.

    Attributes:
        make: draws the network; it takes pictures, (rows, *shape).
        shape: of a picture.
        batch_size: pictures in a batch.
        methods: by name; names tell methods of memory apart.
        shared_rate: a rate with which all methods train, too; None for none.
        ablated: the method that trains with other distances, too, and those; None for none.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_size: int
    methods: Mapping[str, Method]
    shared_rate: float | None = None
    ablated: tuple[str, tuple[float, ...]] | None = None


def perceptron() -> nn.Module:
    """Return a network of 4,810 weights."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def _perceptron_methods() -> dict[str, Method]:
    cocd = {"estimator": "coordinate", "rule": "cocd", "num_directions": 64}
    options: dict[str, dict[str, Any]] = {
        "two-point": {"estimator": "two_point", "num_directions": 16, "direction": "rademacher"},
        "BCCD (γ = 0)": cocd | {"rule": "none"},
        "CoCD γ = 0.9": cocd | {"cocd_decay": 0.9},
        "CoCD γ = 0.99": cocd | {"cocd_decay": 0.99},
        "CoCD γ = 1": cocd | {"cocd_decay": 1.0},
        "CoCD γ = 0.99, forward": cocd | {"cocd_decay": 0.99, "estimator": "coordinate_forward"},
    }
    rates = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    return {name: Method(own, rates, 0.1, 100_000) for name, own in options.items()}


def _resnet_methods() -> dict[str, Method]:
    # Forward differences, because a central one costs twice as much; B and γ as in the paper.
    bccd = {"estimator": "coordinate_forward", "rule": "none", "num_directions": 2048}
    cocd = bccd | {"rule": "cocd", "cocd_decay": 0.95}
    random = {"estimator": "two_point", "num_directions": 8, "direction": "rademacher"}
    return {
        "two-point": Method(random, (0.001, 0.003), 1e-3, 2_500),
        "BCCD (γ = 0)": Method(bccd, (0.03, 0.1), 0.03, 350_000),
        "CoCD γ = 0.95": Method(cocd, (0.001, 0.003), 0.03, 350_000),
    }


#: Networks by name. The shared rate of the first is the paper's.
STUDIES = {
    "mlp": Study(perceptron, (64,), 32, _perceptron_methods(), 0.01, ("CoCD γ = 0.99", (0.01, 1.0))),
    "resnet20": Study(ResNet20, (1, 8, 8), 4, _resnet_methods()),
}
