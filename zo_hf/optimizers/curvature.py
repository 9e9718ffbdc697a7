"""Directions scaled by a running diagonal of the curvature (HiZOO, Zhao et al., arXiv 2402.15173, algorithm 1).

    probe:  ξ ± ε·z/√h          κᵢ = (L₊ + L₋ - 2·L₀) / ε²
    step:   ĝ = 1/q · Σᵢ cᵢ · zᵢ/√h
    then:   h ← (1 - s)·h + s · 1/q · Σᵢ ½|κᵢ| · h · zᵢ²            h = 1 at first

The step uses the h that was probed with. The authors' code takes the new one, so that it moves along another direction
than it measured, and its later version keeps 1/h under the same name.

On a quadratic with Hessian H and D = h^(-½)·H·h^(-½), E[½·κ·h·z²] = ½·tr(D)·h + diag(H): h tends to (d + 2)/2 · diag(H)
in d coordinates. Its ratios are those of the diagonal; its size, and with it ε and the learning rate, is not.

A fold carries h: the curvature of an entry of B, Vⱼᵀ·Hᵢ·Vⱼ/r, has the same mean for every draw of V, so that h stays
what is known about it, and with the paper's s an h that began again at every fold would never leave 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_hf.directions import Distribution
from zo_hf.estimators.estimator import Estimator
from zo_hf.estimators.second_difference import SecondDifference
from zo_hf.method import Method
from zo_hf.optimizers.rule import Rule, RuleOptions
from zo_hf.subspaces.subspace import StreamOf, Subspace

# A probe is at ε/√h: beyond these bounds it would be lost in rounding, or out of all proportion.
SMALLEST, LARGEST = 1e-8, 1e8


class Curvature(Rule):
    """State: h over the coordinates, float32 (float64 where they are), elementwise, so the same bits everywhere."""

    name = "curvature"
    about = Method("HiZOO (2402.15173)", memory="d", needs="zo_estimator=second_difference")
    uses = ("curvature_rate",)
    needs_tensors = True
    needs_estimator = (SecondDifference.name,)

    def __init__(self, subspace: Subspace, estimator: Estimator, options: RuleOptions | None = None) -> None:
        super().__init__(subspace, estimator, options)
        assert isinstance(estimator, SecondDifference) and subspace.materialised is not None
        self._curvatures, self._blocks = estimator.curvatures, subspace.materialised.blocks
        self._h = [torch.ones(b.layout.size, dtype=b.dtype, device=b.layout.device) for b in self._blocks]

    def write_gradient(
        self, projected_gradients: Sequence[float], stream_of: StreamOf, distribution: Distribution
    ) -> None:
        super().write_gradient(projected_gradients, stream_of, distribution)
        rate, curvatures = self.options.curvature_rate, self._curvatures(projected_gradients)
        for block, h in zip(self._blocks, self._h, strict=True):
            factor, measured = torch.full_like(h, 1.0 - rate), torch.zeros_like(h, dtype=torch.bool)
            for index, curvature in enumerate(curvatures):
                squared = block.noise(stream_of(index), distribution).square()
                factor.add_(squared, alpha=rate * 0.5 * abs(curvature) / len(curvatures))
                measured |= squared > 0
            # Where no direction went, nothing was learnt: a layer or an entry that rests keeps its h.
            h.mul_(factor.where(measured, 1.0)).clamp_(SMALLEST, LARGEST)
        self._rescale()

    def _rescale(self) -> None:
        for block, h in zip(self._blocks, self._h, strict=True):
            block.scale = h.sqrt().reciprocal()

    def state(self) -> dict[str, Tensor]:
        return {
            name: block.layout.view(h, name).clone()
            for block, h in zip(self._blocks, self._h, strict=True)
            for name in block.coordinates
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        for block, h in zip(self._blocks, self._h, strict=True):
            for name in block.coordinates:
                block.layout.view(h, name).copy_(state[name])
        self._rescale()
