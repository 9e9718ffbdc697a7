"""The loss and its derivative along a direction from one forward pass with tangents (forward-mode automatic differentiation).

A dual tensor carries a tangent beside its value, and every operation of torch that knows its own derivative hands it on.
Where the moved parameters carry z, the loss ends up with ∇L · z, exact to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def loss_and_derivative(closure: Callable[[], Tensor]) -> Tensor:
    """L and ∇L · z at the point that the model is at, (2,); to be called where tangents are alive.

    Raises:
        ValueError: an operation of the model or the loss has no forward-mode derivative, or the loss is a number that was
            taken out of torch.
    """
    try:
        value, derivative = forward_ad.unpack_dual(closure())
    except NotImplementedError as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise ValueError(
            f"zo_estimator='forward_gradient' cannot differentiate this model ({reason}); use zo_estimator='two_point'."
        ) from error
    if derivative is None:
        raise ValueError(
            "zo_estimator='forward_gradient' needs a loss that torch computes from the moved parameters, and this one has "
            "no derivative; use zo_estimator='two_point'."
        )
    return torch.stack([value.detach(), derivative.detach()])
