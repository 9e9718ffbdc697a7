"""Rounding a weight to codes with error feedback: GPTQ (Frantar et al., arXiv 2210.17323).

A layer's new weight W (m, n) becomes the Ŵ on the grid of its codes whose outputs are nearest on the inputs X (tokens, n):

    min ‖(W - Ŵ) · Xᵀ‖² + λ ‖W - Ŵ‖²          λ = damping · mean of the squared inputs of a column, over all tokens

Columns are rounded to the nearest code one after another. Those that are still free, F, take over the error u that the
others have made in the outputs, as a ridge regression spreads it:

    w_F ← w_F + u · (λI + X_F · X_Fᵀ)⁻¹ · X_F       u = Σ_j (w_j - ŵ_j) · x_jᵀ,  (m, tokens)

GPTQ writes this with the Cholesky factor of H⁻¹ = (Xᵀ·X + λI)⁻¹, an n × n matrix. For fewer tokens than columns the form
above is the same and holds tokens · (m + n + tokens) numbers. Within a block of columns, GPTQ's own recursion runs on
that block of H⁻¹.

Columns with large inputs come first, as long as others are free to take over their errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: GPTQ's own damping is 0.01, for many more inputs than columns.
DAMPING = 0.01

_BLOCK = 64


@dataclass(frozen=True)
class _Block:
    """Some columns in a row, and what their rounding needs of the inputs.

    Attributes:
        columns: indices of the columns, in the order in which they are rounded.
        x: X of these columns, float32 (columns, tokens).
        spread: (λI + X_F · X_Fᵀ)⁻¹ · X of these columns, float32 (tokens, columns).
        feedback: Cholesky factor of the block of H⁻¹ with ones on its diagonal, float32 (columns, columns), upper.
    """

    columns: list[int]
    x: Tensor
    spread: Tensor
    feedback: Tensor


class ErrorFeedback:
    """The inputs of a layer, prepared for rounding any weight that reads them.

    Args:
        inputs: X, (tokens, n).
        damping: λ over the mean of a column's squared inputs, above 0.
    """

    def __init__(self, inputs: Tensor, damping: float = DAMPING) -> None:
        self.inputs = inputs
        x = inputs.double()
        if x.shape[0] > x.shape[1]:  # R of a QR decomposition has the same Xᵀ · X, in fewer rows
            x = torch.linalg.qr(x, mode="r")[1]
        energy = x.square().sum(0)
        mean = float(energy.mean())
        ridge = damping * mean if mean > 0 else 1.0  # without inputs, every column is rounded by itself
        order = energy.argsort(descending=True, stable=True)
        x, columns = x.t()[order].contiguous(), order.tolist()
        free = x.t() @ x
        free.diagonal().add_(ridge)
        self._blocks: list[_Block] = []
        for start in range(0, len(columns), _BLOCK):
            block = x[start : start + _BLOCK]
            spread = torch.cholesky_solve(block.t(), torch.linalg.cholesky(free))
            inverse = torch.eye(len(block), dtype=x.dtype, device=x.device) - block @ spread
            feedback = torch.linalg.cholesky(inverse, upper=True)
            feedback = (feedback / feedback.diagonal()[:, None]).float()
            self._blocks.append(_Block(columns[start : start + _BLOCK], block.float(), spread.float(), feedback))
            free.addmm_(block.t(), block, alpha=-1)

    def round(self, weight: Tensor, nearest: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Round a weight so that its outputs on the inputs change least.

        Args:
            weight: W, float32 (m, n), on the device of the inputs.
            nearest: takes new values of one column, float32 (m,), and its index; returns the values of the nearest codes.

        Returns:
            Ŵ, float32 (m, n).
        """
        target = weight.t().contiguous()
        rounded = torch.empty_like(target)
        error: Tensor | None = None
        for block in self._blocks:
            index = torch.tensor(block.columns, device=weight.device)
            exact = target[index]
            wanted = exact.clone() if error is None else torch.addmm(exact, block.spread.t(), error)
            values = torch.empty_like(wanted)
            for i, column in enumerate(block.columns):
                values[i] = nearest(wanted[i], column)
                wanted[i + 1 :].addr_(block.feedback[i, i + 1 :], wanted[i] - values[i], alpha=-1)
            rounded[index] = values
            missing = block.x.t() @ (exact - values)
            error = missing if error is None else error.add_(missing)
        return rounded.t().contiguous()
