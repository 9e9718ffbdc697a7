"""A linear layer at the points of all groups, with the correction as the beginning of the product's sum.

    y ← b + (x · V) · Bᵀ        y ← y + x · Wᵀ

An ordinary layer on a CPU copies its bias into the output, and adds the product to it. The correction takes the place
of that copy, so the output is written no more often than without a probe.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zo_hf.rng import draw
from zo_hf.subspaces.entries import function_of
from zo_hf.subspaces.layer_inputs import LINEAR, is_transformed


def plain_weights(module: nn.Module, original: Callable, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Return the weight, (n, m), and the bias, (m,), of a layer that does nothing except x · W + b in float32 on a CPU.

    Args:
        module: the layer.
        original: its forward with its own parameters.
        x: its input, (..., n).

    Returns:
        None if the forward is another one, if there are no rows, or if an autocast, a compiler, torch.func or a subclass of
        tensors is to see it.
    """
    if function_of(original, module) not in LINEAR:
        return None
    if type(x) is not Tensor or draw.is_launched(x.device) or x.dtype != torch.float32:
        return None
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or torch.is_grad_enabled():
        return None
    if is_transformed():
        return None
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if type(weight) is not nn.Parameter or weight.dtype != torch.float32 or not x.numel():
        return None
    if bias is not None and (type(bias) is not nn.Parameter or bias.dtype != torch.float32):
        return None
    return (weight if isinstance(module, Conv1D) else weight.t()), bias


def moved_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, thin: Tensor | None, left: Tensor | None, groups: int
) -> Tensor:
    """Compute b + x · W + (x · V) · Bᵀ for every group of rows.

    Args:
        x: (groups · rows, n)
        weight: (n, m)
        bias: (groups, m), or (m,) for all groups
        thin: x · V, (groups · rows, r); None if the matrix does not move
        left: B, (groups, m, r)
        groups: number of groups.

    Returns:
        (groups · rows, m)
    """
    shape = groups, len(x) // groups, weight.shape[1]
    if bias is not None:
        bias = bias.unsqueeze(-2)
    if thin is not None and left is not None:
        thin, right = thin.view(groups, shape[1], -1), left.mT
        output = torch.bmm(thin, right) if bias is None else torch.baddbmm(bias, thin, right)
    else:
        assert bias is not None
        output = bias.expand(shape).contiguous()
    return output.view(-1, shape[2]).addmm_(x, weight)
