"""The sign of the projected gradient (ZO-signSGD as benchmarked by Zhang et al., arXiv 2402.11592).

    ĝ = 1/q · Σᵢ sign(cᵢ) · zᵢ

The learning rate over √q is then the root mean square length of a step per coordinate, whatever the scale of the loss.
Along single coordinates nothing is averaged, and it is the length of each.
"""

from __future__ import annotations

from collections.abc import Sequence

from zo_hf.directions import Distribution
from zo_hf.method import Method
from zo_hf.optimizers.rule import Rule
from zo_hf.subspaces.subspace import StreamOf


class Sign(Rule):
    """Which way along each direction, and not how far; a c of zero moves nothing."""

    name = "sign"
    about = Method("ZO-signSGD (2402.11592)")
    divides_scale_out = True

    def write_gradient(
        self, projected_gradients: Sequence[float], stream_of: StreamOf, distribution: Distribution
    ) -> None:
        signs = [float((c > 0) - (c < 0)) for c in projected_gradients]
        self.subspace.write_gradient(self.estimator.coefficients(signs), stream_of, distribution)
