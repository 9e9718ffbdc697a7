"""The sign of the projected gradient (ZO-signSGD as benchmarked by Zhang et al., arXiv 2402.11592).

    ĝ = 1/q · Σᵢ sign(cᵢ) · zᵢ

The learning rate divided by √q is then the root mean square length of a step per coordinate, at any scale of the loss.
With single coordinates as directions nothing is averaged, and the learning rate is the length of each step.
"""

from __future__ import annotations

from collections.abc import Sequence

from zo_hf.directions import Distribution
from zo_hf.method_info import Method
from zo_hf.rng import StreamOf
from zo_hf.rules.rule import Rule


class Sign(Rule):
    """The sign of c along each direction, without its size; c = 0 moves nothing."""

    name = "sign"
    about = Method("ZO-signSGD (2402.11592)")
    divides_scale_out = True

    def write_gradient(
        self, projected_gradients: Sequence[float], stream_of: StreamOf, distribution: Distribution
    ) -> None:
        signs = [float((c > 0) - (c < 0)) for c in projected_gradients]
        self.subspace.write_gradient(self.estimator.coefficients(signs), stream_of, distribution)
