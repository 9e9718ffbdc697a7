"""One run of a method: with the engine, or with derivatives in place of differences, for a tenth of the time or less."""

from __future__ import annotations

import torch
from common.coordinate_studies import Method
from common.digit_pictures import BatchLoss
from common.resnet20 import ResNet20
from common.single_weights import SingleWeightLosses
from torch import Tensor, nn
from torch.nn import functional as F

from zo_hf import ZerothOrder
from zo_hf.directions.unit_vectors import unit_vectors
from zo_hf.subspaces import FullInMemory


class EngineDescent:
    """Steps of the engine.

    Args:
        model: the network.
        method: how it is trained.
        learning_rate: α.
        eps: distance of a probe.
        seed: of the directions.
    """

    def __init__(self, model: nn.Module, method: Method, learning_rate: float, eps: float, seed: int) -> None:
        self._model, self._method = model, method
        subspace = FullInMemory(model, seed=seed)
        self.coordinates = subspace.dimension
        self._zo = ZerothOrder(model, subspace, eps=eps, seed=seed, batched_probes=True, **method.options)
        of_linear = learning_rate * method.of_linear
        groups = [
            {"params": [coordinate], "lr": of_linear if name.startswith("linear.") else learning_rate}
            for name, coordinate in subspace.coordinates.items()
        ]
        self._optimizer = self._zo.prepare(torch.optim.SGD(groups))

    @property
    def steps(self) -> int:
        return self._zo.step

    @property
    def forward_passes(self) -> int:
        return self._zo.forward_passes

    def take_step(self, pictures: Tensor, labels: Tensor) -> None:
        """Take a step on a batch: (rows, ...) and (rows,)."""
        if isinstance(self._model, ResNet20) and self._method.along_coordinates:
            self._zo.estimate(SingleWeightLosses(self._zo, self._model, pictures, labels))
        else:
            self._zo.estimate(BatchLoss(self._model, pictures, labels))
        self._optimizer.step()

    def coherence(self) -> float | None:
        """Return the coherence of the last step; None if it has none."""
        return self._zo.rule.logs().get("zo/coherence")


class SlopeDescent:
    """The steps that `EngineDescent` takes along coordinates, in the limit of ε = 0: derivatives come from autograd.

    Args:
        model: the network.
        method: how it is trained; one along coordinates, with memory for all of them.
        learning_rate: α.
        seed: of the order of coordinates.

    Attributes:
        forward_passes: of the run that it stands for.
    """

    def __init__(self, model: nn.Module, method: Method, learning_rate: float, seed: int) -> None:
        assert method.options["estimator"] == "coordinate_forward"
        self._model, self._per_step = model, int(method.options["num_directions"])
        parameters = dict(model.named_parameters())
        order = method.options.get("coordinate_order", "cyclic")
        self._order = unit_vectors(parameters, self._per_step, order, seed).order
        self._decay = method.options["cocd_decay"] if method.options["rule"] == "cocd" else 0.0
        of_linear = learning_rate * method.of_linear
        self._rates = [of_linear if name.startswith("linear.") else learning_rate for name in parameters]
        self._parameters, self.coordinates = list(parameters.values()), len(self._order)
        self._remembered = self._parameters[0].new_zeros(self.coordinates)
        self._coherence: float | None = None
        self.steps = 0

    @property
    def forward_passes(self) -> int:
        return self.steps * (self._per_step + 1)

    def take_step(self, pictures: Tensor, labels: Tensor) -> None:
        """Take a step on a batch: (rows, ...) and (rows,)."""
        loss = F.cross_entropy(self._model(pictures), labels)
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, self._parameters)])
        turns = torch.arange(self.steps * self._per_step, (self.steps + 1) * self._per_step)
        now = self._order[turns % self.coordinates]
        old, new = self._remembered[now], gradient[now]
        is_known = int(turns[0]) >= self.coordinates and bool(old.any())
        self._coherence = float((old / old.norm()) @ (new / new.norm())) if is_known else None
        self._remembered *= self._decay
        self._remembered[now] = new
        moves = self._remembered.split([parameter.numel() for parameter in self._parameters])
        with torch.no_grad():
            for parameter, move, rate in zip(self._parameters, moves, self._rates, strict=True):
                parameter -= rate * move.view_as(parameter)
        self.steps += 1

    def coherence(self) -> float | None:
        """Return the coherence of the last step; None if it has none."""
        return self._coherence
