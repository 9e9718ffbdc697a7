"""What stands between an estimate and the torch optimizer: the rule that turns projected gradients into a gradient.

    plain:   ĝ = Σᵢ coefficientᵢ · zᵢ

A rule leaves its result where the torch optimizer looks (`.grad` of the coordinates, or the pending list of the full
subspace), so learning rates, schedules, weight decay and clipping work the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from zo_hf.directions import Distribution
from zo_hf.estimators.estimator import Estimator
from zo_hf.method import Method
from zo_hf.subspaces.subspace import StreamOf, Subspace


class Rule:
    """The plain rule: the estimate itself is the gradient.

    Args:
        subspace: whose coordinates move.
        estimator: makes the projected gradients.

    Raises:
        ValueError: the rule does not work with this subspace or estimator; the message says what to use instead.
    """

    #: The name used in options.
    name: ClassVar[str] = "none"
    about: ClassVar[Method] = Method("ZO-SGD (2305.17333), or the torch optimizer named by optim")

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of its own, as it was made with them; ZOConfig calls them zo_{name}_{argument}."""
        return {}

    def __init__(self, subspace: Subspace, estimator: Estimator) -> None:
        self.subspace, self.estimator = subspace, estimator

    def write_gradient(
        self, projected_gradients: Sequence[float], stream_of: StreamOf, distribution: Distribution
    ) -> None:
        """Leave the gradient of this step to the torch optimizer; a replay calls it with the recorded numbers."""
        coefficients = self.estimator.coefficients(projected_gradients)
        self.subspace.write_gradient(coefficients, stream_of, distribution)

    def after_fold(self) -> None:
        """To be called when the subspace has drawn new bases."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that the rest of the run depends on, by name; a checkpoint holds them."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned."""
