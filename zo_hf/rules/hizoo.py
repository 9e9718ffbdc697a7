"""Directions scaled by a running diagonal of the curvature (HiZOO, Zhao et al., arXiv 2402.15173, algorithm 1).

    probe:  ξ ± ε·z/√h          κᵢ = (L₊ + L₋ - 2·L₀) / ε²
    step:   ĝ = 1/q · Σᵢ cᵢ · zᵢ/√h
    then:   h ← (1 - s)·h + s · 1/q · Σᵢ ½|κᵢ| · h · zᵢ²            h = 1 at first

The step uses the h that its probes used. The authors' code uses the updated h, so it moves along a direction that it
did not measure. A later version of that code stores 1/h under the same name.

On a quadratic with Hessian H and D = h^(-½)·H·h^(-½), E[½·κ·h·z²] = ½·tr(D)·h + diag(H): h tends to (d + 2)/2 ·
diag(H) in d coordinates. So h has the ratios of the diagonal but not its scale, which affects ε and the learning rate.

If groups of rows have directions of their own, κ of a group belongs to its share ℓ_g, with Hessian H_g. Their sum comes
before the absolute value, |Σ_g κ_gᵢ · z_gᵢ²| in place of |κᵢ| · zᵢ². Since Σ_g H_g = H, the mean of ½·h·Σ_g κ_g·z_g² is
the same ½·tr(D)·h + diag(H). Absolute values of every κ_g would add up to more, as shares curve both ways.

A fold keeps h. The curvature of an entry of B, Vⱼᵀ·Hᵢ·Vⱼ/r, has the same mean for every draw of V, so h stays a valid
estimate of it. With the paper's s, an h that restarted at every fold would never leave 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_hf.directions import Distribution
from zo_hf.estimators.estimator import Estimator
from zo_hf.estimators.second_difference import SecondDifference
from zo_hf.method_info import Method
from zo_hf.rng import StreamOf
from zo_hf.rules.options import RuleOptions
from zo_hf.rules.rule import Rule
from zo_hf.subspaces.subspace import Subspace

# Bounds on h. A probe is at distance ε/√h, which outside these bounds is lost in rounding or far too large.
SMALLEST, LARGEST = 1e-8, 1e8


class Curvature(Rule):
    """The rule of the module's formulas. State: h for every coordinate, float32, or float64 for float64 coordinates.

    All operations on h are elementwise, so that every rank computes the same bits.
    """

    name = "curvature"
    aliases = ("hizoo",)
    about = Method("HiZOO (2402.15173)", memory="d", needs="zo_estimator=second_difference")
    uses = ("curvature_rate",)
    needs_tensors = True
    needs_estimator = (SecondDifference.name,)

    def __init__(self, subspace: Subspace, estimator: Estimator, options: RuleOptions | None = None) -> None:
        super().__init__(subspace, estimator, options)
        assert isinstance(estimator, SecondDifference) and subspace.coordinate_blocks is not None
        self._curvatures, self._blocks = estimator.curvatures, subspace.coordinate_blocks
        self._h = [torch.ones(b.layout.size, dtype=b.dtype, device=b.layout.device) for b in self._blocks]

    def write_gradient(
        self, projected_gradients: Sequence[float], stream_of: StreamOf, distribution: Distribution
    ) -> None:
        super().write_gradient(projected_gradients, stream_of, distribution)
        rate, directions = self.options.curvature_rate, self.estimator.num_directions
        curvatures = self._curvatures(projected_gradients)
        for block, h in zip(self._blocks, self._h, strict=True):
            factor, measured = torch.full_like(h, 1.0 - rate), torch.zeros_like(h, dtype=torch.bool)
            for index in range(directions):
                squared = block.noise(stream_of(index), distribution).square()
                measured |= squared > 0
                curvature = curvatures[index]
                if len(curvatures) > directions:  # of several groups
                    squared.mul_(curvature)
                    for other in range(index + directions, len(curvatures), directions):
                        squared.add_(block.noise(stream_of(other), distribution).square(), alpha=curvatures[other])
                    squared, curvature = squared.abs_(), 1.0
                factor.add_(squared, alpha=rate * 0.5 * abs(curvature) / directions)
            # An entry that no direction perturbed was not measured, and keeps its h.
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
