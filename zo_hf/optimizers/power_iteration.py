"""The leading singular directions of the estimate alone (ZO-MOPI, arXiv 2605.09034), by streaming power iteration.

    V ← QR(Mᵀ·(M·V)),   U ← the columns of M·V, each of length 1          V: (n, k), the shorter side's, kept between steps
    step:  √(mn/k) · U·Vᵀ

One sweep a step: the V of the step before is the start, and the identity's first columns are at the beginning. Orthogonalising
all directions amplifies those that are noise; the authors' scripts have k = 32 of r = 64, so k is half of what there is
unless `zo_spectral_rank` says otherwise, and no momentum. As there, a fold, which draws new bases, begins again with V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zo_hf.estimators.estimator import Estimator
from zo_hf.method import Method
from zo_hf.optimizers.rule import RuleOptions
from zo_hf.optimizers.spectral import Spectral
from zo_hf.subspaces.subspace import Subspace


class PowerIteration(Spectral):
    """State: V of every matrix, beside the momentum."""

    name = "power_iteration"
    about = Method("ZO-MOPI (2605.09034)", memory="k·n a matrix, +d with zo_momentum", needs="q of 2, or zo_momentum")
    uses = (*Spectral.uses, "spectral_rank")

    def __init__(self, subspace: Subspace, estimator: Estimator, options: RuleOptions | None = None) -> None:
        super().__init__(subspace, estimator, options)
        self._right: dict[str, Tensor] = {}

    def orthogonalised(self, name: str, matrix: Tensor) -> Tensor:
        is_wide = matrix.shape[0] < matrix.shape[1]
        tall = matrix.t() if is_wide else matrix
        columns = tall.shape[1]
        k = min(self.options.spectral_rank or max(1, columns // 2), columns)
        start = self._right.get(name)
        if start is None:
            start = torch.eye(columns, k, dtype=tall.dtype, device=tall.device)
        # Contiguous, as it is after a way through a checkpoint: bits of a product depend on the layout.
        right = torch.linalg.qr(tall.t() @ (tall @ start))[0].contiguous()
        self._right[name] = right
        left = tall @ right
        lengths = left.norm(dim=0)
        # A column that is nothing but rounding stays nothing.
        negligible = torch.finfo(tall.dtype).eps * max(tall.shape) * lengths.max()
        left = torch.where(lengths > negligible, left / lengths, 0.0)
        step = left @ right.t() * (matrix.numel() / k) ** 0.5
        return step.t() if is_wide else step

    def after_fold(self) -> None:
        super().after_fold()
        self._right.clear()

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"right/{name}": tensor.clone() for name, tensor in self._right.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self._right = self._part_of(state, "right/")
