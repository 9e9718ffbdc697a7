"""The precision in which a model computes its loss, whatever the dtype of the loss itself.

transformers returns the loss of any model in float32. Its rounding error depends on the coarsest dtype on the way to it:
that of the weights, of the loss, or of autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# The part of a loss that rounding explains between two orders of the same computation, by its dtype.
_ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def coarsest(model: nn.Module, *others: torch.dtype | None) -> torch.dtype:
    """Return the coarsest dtype of a model's weights and of others on the way to its loss; None is no dtype."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    found |= {dtype for dtype in others if dtype is not None}
    return max(found, key=lambda dtype: rounding(dtype), default=torch.float32)


def rounding(dtype: torch.dtype) -> float:
    """Return the relative difference of a loss that rounding explains in a dtype; other dtypes count as bfloat16."""
    return _ROUNDING.get(dtype, _ROUNDING[torch.bfloat16])


def same_but_for_order(own: Tensor, known: Tensor) -> bool:
    """Return whether two losses from the same logits differ by no more than the order of summation explains."""
    own, known = own.detach().float(), known.detach().float()
    return bool(torch.isclose(own, known, rtol=1e-5, atol=1e-6, equal_nan=True))


def same_but_for_rounding(found: Tensor, whole: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the mean losses of the same tokens agree as far as a computation in `dtype` can.

    Args:
        found: the losses of tokens, float32 (rows, positions).
        whole: the same from another evaluation.
        dtype: the coarsest dtype of the computation.
    """
    apart = (found.mean() - whole.mean()).abs()
    return bool(apart <= rounding(dtype) * whole.mean().abs().clamp(min=1.0))
