"""What the spectral rules share: momentum in the coordinates, and steps of one length for every shape.

    M ← β·M + (1 - β)·ĝ
    matrix:   O = √(mn/k) · U·Vᵀ       of M's leading k singular directions, U: (m, k), V: (n, k)
    vector:   o = M / √(mean of M²)

U·Vᵀ has k singular values of 1, so the root mean square of an entry of O is 1, as it is for vectors, and the learning rate
is the root mean square length of a step per coordinate. A paper's η for W ← W - η·P·U·Vᵀ, P orthonormal, is this one
times √(mn/k), m and n being those of W.

Replicas have the same bits if they run the same kind of machine with the same version of torch. The number of CPU threads
does not matter: what depends on it (the QR decomposition does, the matrix products and norms measured here do not) is
computed by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from zo_hf.directions import Distribution
from zo_hf.estimators.estimator import Estimator
from zo_hf.one_thread import one_thread
from zo_hf.optimizers.rule import Rule, RuleOptions
from zo_hf.subspaces.subspace import StreamOf, Subspace


class Spectral(Rule):
    """Works on the coordinates' own matrices: B (m, r) of a low-rank factor, S (r, r) of a core, an adapter's weights.

    A tensor of more than two dimensions is the matrix of its first against the others.
    """

    uses: ClassVar[tuple[str, ...]] = ("momentum", "momentum_at_fold")
    needs_tensors = True
    fills_tensors = True
    divides_scale_out = True

    def __init__(self, subspace: Subspace, estimator: Estimator, options: RuleOptions | None = None) -> None:
        super().__init__(subspace, estimator, options)
        self._momentum: dict[str, Tensor] = {}

    @classmethod
    def check(cls, subspace: str, estimator: str, num_directions: int, options: RuleOptions) -> None:
        super().check(subspace, estimator, num_directions, options)
        if num_directions < 2 and not options.momentum:
            raise ValueError(
                f"zo_rule={cls.name!r} needs zo_num_directions={num_directions} to be at least 2, because the singular "
                "directions of a single random matrix say nothing; use 4, or zo_momentum=0.9."
            )

    def orthogonalised(self, name: str, matrix: Tensor) -> Tensor:
        """U·Vᵀ of a matrix, (m, n), times √(mn/k)."""
        raise NotImplementedError

    def write_gradient(
        self, projected_gradients: Sequence[float], stream_of: StreamOf, distribution: Distribution
    ) -> None:
        super().write_gradient(projected_gradients, stream_of, distribution)
        with one_thread():
            for name, coordinate in self.subspace.coordinates.items():
                gradient = coordinate.grad
                if gradient is None:  # a layer that does not move in this step
                    continue
                mean = of_size_one(self._averaged(name, gradient))
                if mean.ndim < 2:
                    step = mean / root_mean_square(mean)
                else:
                    step = self.orthogonalised(name, mean.flatten(1)).view(mean.shape)
                gradient.copy_(step)

    def _averaged(self, name: str, gradient: Tensor) -> Tensor:
        beta = self.options.momentum
        if not beta:
            return gradient
        if name not in self._momentum:
            self._momentum[name] = torch.zeros_like(gradient)
        return self._momentum[name].mul_(beta).add_(gradient, alpha=1.0 - beta)

    def after_fold(self) -> None:
        if self.options.momentum_at_fold == "reset":
            self._momentum.clear()

    def state(self) -> dict[str, Tensor]:
        return {f"momentum/{name}": tensor.clone() for name, tensor in self._momentum.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._momentum = self._part_of(state, "momentum/")

    def _part_of(self, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """The entries of a loaded state that begin with `prefix`, without it, where the coordinates are."""
        named = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        return {name: t.to(self.subspace.coordinates[name].device) for name, t in named.items()}


def of_size_one(tensor: Tensor) -> Tensor:
    """The tensor with a largest magnitude of 1, so that no square of it overflows or vanishes; zeros stay zeros."""
    return tensor / tensor.abs().amax().clamp_min(torch.finfo(tensor.dtype).tiny)


def root_mean_square(tensor: Tensor) -> Tensor:
    """The root mean square of the entries, (); never zero."""
    return tensor.square().mean().sqrt().clamp_min(torch.finfo(tensor.dtype).tiny)
