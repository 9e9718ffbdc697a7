"""A step along the estimate's leading singular directions, by streaming power iteration (ZO-MOPI, arXiv 2605.09034).

    V ← QR(Mᵀ·(M·V)),   U ← the columns of M·V, each of length 1          V: (n, k), the shorter side's, kept between steps
    step:  √(mn/k) · U·Vᵀ

Each step makes one sweep, which starts from the V of the previous step. The first step starts from the first columns
of the identity. Orthogonalizing all directions would amplify noise. The authors' scripts use k = 32 with r = 64 and no
momentum, so k defaults to half of the singular directions; `zo_spectral_rank` sets it. As in their code, V restarts at
every fold, since a fold draws new bases.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zo_hf.estimators.estimator import Estimator
from zo_hf.method_info import Method
from zo_hf.rules.rule import RuleOptions
from zo_hf.rules.spectral import Spectral
from zo_hf.subspaces.subspace import Subspace


class PowerIteration(Spectral):
    """The rule of the module's formulas. State: V of every matrix, and the momentum."""

    name = "power_iteration"
    aliases = ("mopi",)
    about = Method("ZO-MOPI (2605.09034)", memory="k·n a matrix, +d with zo_momentum", needs="q ≥ 2, or zo_momentum")
    uses = (*Spectral.uses, "spectral_rank")

    def __init__(self, subspace: Subspace, estimator: Estimator, options: RuleOptions | None = None) -> None:
        super().__init__(subspace, estimator, options)
        self._right: dict[str, Tensor] = {}

    def orthogonalized(self, name: str, matrix: Tensor) -> Tensor:
        is_wide = matrix.shape[0] < matrix.shape[1]
        tall = matrix.t() if is_wide else matrix
        columns = tall.shape[1]
        k = min(self.options.spectral_rank or max(1, columns // 2), columns)
        start = self._right.get(name)
        if start is None:
            start = torch.eye(columns, k, dtype=tall.dtype, device=tall.device)
        # Contiguous, as a tensor loaded from a checkpoint is: the bits of a product depend on the memory layout.
        right = torch.linalg.qr(tall.t() @ (tall @ start))[0].contiguous()
        self._right[name] = right
        left = tall @ right
        lengths = left.norm(dim=0)
        # A column that is pure rounding error becomes zero, not a unit vector.
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
