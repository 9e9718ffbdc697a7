"""Embeddings whose forward does more than look up rows of their weight.

A low-rank weight W + B·Vᵀ needs no moved embedding where a lookup f is linear and keeps features apart:

    f(W + B·Vᵀ) = f(W) + f(B) · Vᵀ

Scaled outputs and shifted positions leave this true. A norm of what was looked up, or anything added to it, does not. One
product of random matrices tells them apart: f(B·M) = f(B)·M.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from zo_hf.subspaces.entries import forward_of
from zo_hf.subspaces.functional import HALF, functional_call

_WIDTH = 3


class Lookups:
    """The lookups of one model, each compared once.

    A compiled forward reads what is known. Kept by the subspace, it does not change with other models in the process.
    """

    def __init__(self) -> None:
        self._known: dict[nn.Module, bool] = {}
        self._giving_views: set[nn.Module] = set()

    def keep_products(self, module: nn.Module, args: Sequence, kwargs: Mapping) -> bool:
        """Return whether f(W + B·Vᵀ) = f(W) + f(B)·Vᵀ for a module, as found once from random matrices.

        Args:
            module: any module.
            args: its inputs.
            kwargs: inputs by keyword.
        """
        if not isinstance(module, nn.Embedding):
            return False
        if forward_of(module) is nn.Embedding.forward:
            return True
        if module not in self._known:
            if torch.compiler.is_compiling():
                return False
            weight = module._parameters["weight"]
            if weight is None or weight.is_meta or isinstance(weight, FakeTensor):
                return True  # a plan, which has no values
            self._known[module] = self._compare(module, weight, args, kwargs)
        return self._known[module]

    def writable(self, module: nn.Module, output: Tensor) -> Tensor:
        """Return the output of a lookup, or a copy where the module returns a view of its weight."""
        return output.clone() if module in self._giving_views else output

    def _compare(self, module: nn.Embedding, weight: Tensor, args: Sequence, kwargs: Mapping) -> bool:
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(n, _WIDTH, generator=generator, dtype=torch.float64) for n in (len(weight), _WIDTH))

        def looked_up(value: Tensor) -> Any:
            value = value.to(weight.device, weight.dtype)
            output = functional_call(module, {"weight": value}, args, kwargs)
            if (
                isinstance(output, Tensor)
                and output.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
            ):
                self._giving_views.add(module)
            return output

        try:
            whole, part = looked_up(left @ right), looked_up(left)
            if not isinstance(whole, Tensor):  # ProphetNet's also returns the positions that it has looked up
                return False
            product = part.double() @ right.to(part.device)
            size = product.abs().max().clamp(min=1.0).item()
            tolerance = size * (2e-2 if whole.dtype in HALF else 1e-4)
            return torch.allclose(whole.double(), product, rtol=0.0, atol=tolerance)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False  # a child takes the width of the weight
