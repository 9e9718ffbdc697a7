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
        batch_size: pictures in a batch.
        has_slopes: True for derivatives by autograd in place of differences; of coordinates only.
        of_linear: the rate of the last layer, as a multiple of that of all others.
    """

    options: Mapping[str, Any]
    rates: tuple[float, ...]
    eps: float
    forwards: int
    batch_size: int
    has_slopes: bool = False
    of_linear: float = 1.0

    @property
    def along_coordinates(self) -> bool:
        return str(self.options["estimator"]).startswith("coordinate")


@dataclass(frozen=True)
class Study:
    """A network and the methods that are compared on it.

    Attributes:
        make: draws the network; it takes pictures, (rows, *shape).
        shape: of a picture.
        methods: by name; names tell methods of memory apart.
        shared_rate: a rate with which all methods train, too; None for none.
        ablated: the method that trains with other distances, too, and those; None for none.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
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
    return {name: Method(own, rates, 0.1, 100_000, 32) for name, own in options.items()}


def _resnet_methods() -> dict[str, Method]:
    # Forward differences, because a central one costs twice as much; B and γ as in the paper. The order is permuted, for
    # in cyclic order the linear layer is one step, and its curvature bounds the rate of all layers. Rates are tuned along
    # slopes; methods of real passes have those that were the best there.
    cyclic = {"estimator": "coordinate_forward", "rule": "none", "num_directions": 2048}
    bccd = cyclic | {"coordinate_order": "permuted"}
    remember = {"rule": "cocd", "cocd_decay": 0.95}
    random = {"estimator": "two_point", "num_directions": 8, "direction": "rademacher"}
    eps, cycles = 0.01, 5 * 270_000

    def slopes(options: Mapping[str, Any], *rates: float, batch_size: int = 4, of_linear: float = 1.0) -> Method:
        return Method(options, rates, eps, cycles, batch_size, has_slopes=True, of_linear=of_linear)

    return {
        "two-point": Method(random, (0.0003, 0.001, 0.002, 0.004), 1e-3, 3_500, 4),
        "BCCD (γ = 0)": Method(bccd, (0.4,), eps, cycles, 4),
        "CoCD γ = 0.95": Method(bccd | remember, (0.02,), eps, cycles, 4),
        "BCCD, slopes": slopes(bccd, 0.1, 0.2, 0.4, 0.8),
        "CoCD γ = 0.95, slopes": slopes(bccd | remember, 0.005, 0.01, 0.02, 0.04),
        "BCCD, cyclic, slopes": slopes(cyclic, 0.01, 0.03, 0.06, 0.12),
        "BCCD, cyclic, linear α/10, slopes": slopes(cyclic, 0.05, 0.1, 0.2, 0.4, of_linear=0.1),
        "CoCD γ = 0.95, cyclic, linear α/10, slopes": slopes(
            cyclic | remember, 0.005, 0.01, 0.02, 0.04, of_linear=0.1
        ),
        "BCCD, batch 16, slopes": slopes(bccd, 0.3, 0.6, 1.2, 2.4, batch_size=16),
        "CoCD γ = 0.95, batch 16, slopes": slopes(bccd | remember, 0.015, 0.03, 0.06, 0.12, batch_size=16),
    }


#: Networks by name. The shared rate of the first is the paper's.
STUDIES = {
    "mlp": Study(perceptron, (64,), _perceptron_methods(), 0.01, ("CoCD γ = 0.99", (0.01, 1.0))),
    "resnet20": Study(ResNet20, (1, 8, 8), _resnet_methods()),
}
