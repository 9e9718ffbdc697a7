"""The loss and its directional derivative from one forward pass (forward-mode automatic differentiation).

A dual tensor carries a tangent beside its value. Every torch operation with a forward-mode derivative propagates it.
If the moved parameters carry the tangent z, the loss carries ∇L · z, exact up to rounding. If groups of rows have
tangents of their own, the share of each group carries its own derivative, ∇ℓ_g · z_g.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from zo_hf.estimators.probe import Probe
from zo_hf.reason import reason_of


def own_passes(probes: Sequence[Probe]) -> list[Probe]:
    """Return the probes that take a forward pass of their own; a loss before its derivative comes with it."""
    return [probe for i, probe in enumerate(probes) if not any(after.derivative for after in probes[i + 1 : i + 2])]


def loss_and_derivative(closure: Callable[[], Tensor]) -> Tensor:
    """Return losses and their derivatives along z at the current point; the caller has attached the tangents.

    Args:
        closure: computes the loss, (), or the shares of groups of rows, (groups,).

    Returns:
        L and ∇L · z, (2,), or those of every group, (2, groups).

    Raises:
        ValueError: an operation of the model or the loss has no forward-mode derivative, or the loss was not computed
            by torch from the moved parameters.
    """
    try:
        value, derivative = forward_ad.unpack_dual(closure())
    except NotImplementedError as error:
        reason = reason_of(error)
        raise ValueError(
            f"zo_estimator='forward_gradient' cannot differentiate this model ({reason}); use zo_estimator='two_point'."
        ) from error
    if derivative is None:
        raise ValueError(
            "zo_estimator='forward_gradient' needs a loss that torch computes from the moved parameters, and this loss has "
            "no derivative; use zo_estimator='two_point'."
        )
    return torch.stack([value.detach(), derivative.detach()])
