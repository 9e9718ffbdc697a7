"""The sign of the projected gradient (ZO-signSGD as benchmarked by Zhang et al., arXiv 2402.11592).

    ĝ = 1/q · Σᵢ sign(cᵢ) · zᵢ

The learning rate is then the root mean square length of a step per coordinate, whatever the scale of the loss.
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

    def write_gradient(
        self, projected_gradients: Sequence[float], stream_of: StreamOf, distribution: Distribution
    ) -> None:
        coefficients = self.estimator.coefficients(projected_gradients)
        signs = [((c > 0) - (c < 0)) / len(coefficients) for c in coefficients]
        self.subspace.write_gradient(signs, stream_of, distribution)
