"""torchao's weight-only int8: a plain Linear with an Int8Tensor as its weight.

Ŵ = qdata · scale        qdata (m, n) int8, scale (m, 1), float32
"""

from __future__ import annotations

import torch
from torch import Tensor

from zo_hf.quantization.rowwise import RowwiseInt8


class TorchAOInt8(RowwiseInt8):
    """The layer of the formula above; the weight has one scale per row and no zero point."""

    format = "int8 of torchao"
    smallest = -128
    code_parts = ("weight.qdata",)

    def storage(self) -> dict[str, Tensor]:
        weight = self.module.weight
        return {"weight.qdata": weight.qdata, "weight.scale": weight.scale}

    def saved_name(self, part: str) -> str:
        return part.replace("weight.", "_weight_")

    def codes(self, storage: dict[str, Tensor]) -> Tensor:
        return storage["weight.qdata"]

    def units(self, storage: dict[str, Tensor]) -> Tensor:
        return storage["weight.scale"].flatten().float()

    def set_units(self, storage: dict[str, Tensor], start: int, units: Tensor) -> Tensor:
        stored = storage["weight.scale"].view(-1)[start : start + len(units)]
        rounded = units.to(stored.dtype)
        too_small = rounded.float() < units  # with a unit rounded down, the largest code would be too small
        infinity = torch.full_like(rounded, torch.inf)
        stored.copy_(torch.where(too_small, torch.nextafter(rounded, infinity), rounded))
        return stored.float()

    def state_entries(self, storage: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = self.module.weight
        names, context = weight.__tensor_flatten__()
        parts = {name: getattr(weight, name) for name in names}
        parts |= {"qdata": storage["weight.qdata"], "scale": storage["weight.scale"]}
        return {"weight": type(weight).__tensor_unflatten__(parts, context, None, None)}
