"""The base class of the spectral rules: momentum in the coordinates, and steps of one length for every shape.

    M ← β·M + (1 - β)·ĝ
    matrix:   O = √(mn/k) · U·Vᵀ       of M's leading k singular directions, U: (m, k), V: (n, k)
    vector:   o = M / √(mean of M²)

U·Vᵀ has k singular values of 1, so the root mean square of an entry of O is 1, as it is for vectors. The learning rate
is therefore the root mean square length of a step per coordinate. A paper's η for W ← W - η·P·U·Vᵀ with orthonormal P
equals this learning rate times √(mn/k), where m and n are those of W.

Replicas compute the same bits if they run on the same kind of machine with the same version of torch. The number of
CPU threads does not matter, because the step is computed by one thread. (The QR decomposition depends on that number;
the matrix products and norms tested here do not.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from zo_hf.directions import Distribution
from zo_hf.estimators.estimator import Estimator
from zo_hf.rng import StreamOf
from zo_hf.rng.single_thread import single_thread
from zo_hf.rules.options import RuleOptions
from zo_hf.rules.rule import Rule
from zo_hf.subspaces.subspace import Subspace


class Spectral(Rule):
    """A rule for the coordinates' matrices: B (m, r) of a low-rank factor, S (r, r) of a core, or adapter weights.

    A tensor of more than two dimensions is flattened to a matrix with its first dimension as rows.
    """

    uses: ClassVar[tuple[str, ...]] = ("momentum", "momentum_at_fold")
    needs_tensors = True
    fills_tensors = True
    divides_scale_out = True

    def __init__(self, subspace: Subspace, estimator: Estimator, options: RuleOptions | None = None) -> None:
        super().__init__(subspace, estimator, options)
        self._momentum: dict[str, Tensor] = {}

    def orthogonalized(self, name: str, matrix: Tensor) -> Tensor:
        """Return √(mn/k)·U·Vᵀ of a matrix, (m, n)."""
        raise NotImplementedError

    def write_gradient(
        self, projected_gradients: Sequence[float], stream_of: StreamOf, distribution: Distribution
    ) -> None:
        super().write_gradient(projected_gradients, stream_of, distribution)
        with single_thread():
            for name, coordinate in self.subspace.coordinates.items():
                gradient = coordinate.grad
                if gradient is None:  # a layer that does not move in this step
                    continue
                mean = with_unit_maximum(self._averaged(name, gradient))
                if mean.ndim < 2:
                    step = mean / root_mean_square(mean)
                else:
                    step = self.orthogonalized(name, mean.flatten(1)).view(mean.shape)
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
        """Return a loaded state's entries under `prefix`, without the prefix, on the devices of the coordinates."""
        named = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        return {name: t.to(self.subspace.coordinates[name].device) for name, t in named.items()}


def with_unit_maximum(tensor: Tensor) -> Tensor:
    """Scale the tensor to a largest magnitude of 1, so that no square overflows or vanishes; zeros stay zeros."""
    return tensor / tensor.abs().amax().clamp_min(torch.finfo(tensor.dtype).tiny)


def root_mean_square(tensor: Tensor) -> Tensor:
    """Return the root mean square of the entries, (); never zero."""
    return tensor.square().mean().sqrt().clamp_min(torch.finfo(tensor.dtype).tiny)
