"""The loss and its directional derivative from one forward pass (forward-mode automatic differentiation).

A dual tensor carries a tangent beside its value. Every torch operation with a forward-mode derivative propagates it.
If the moved parameters carry the tangent z, the loss carries ∇L · z, exact up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def loss_and_derivative(closure: Callable[[], Tensor]) -> Tensor:
    """Return L and ∇L · z at the current point, (2,); the caller has attached the tangents.

    Raises:
        ValueError: an operation of the model or the loss has no forward-mode derivative, or the loss was not computed
            by torch from the moved parameters.
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
            "zo_estimator='forward_gradient' needs a loss that torch computes from the moved parameters, and this loss has "
            "no derivative; use zo_estimator='two_point'."
        )
    return torch.stack([value.detach(), derivative.detach()])
