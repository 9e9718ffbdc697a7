"""bitsandbytes' Linear4bit: nf4 and fp4 (QLoRA; Dettmers et al., arXiv 2305.14314), with and without double quantisation.

    Ŵ[block] = levels[codes] · absmax[block]                 16 levels; a block is 64 elements in a row-major weight
    absmax   = map[codes₂] · absmax₂[block₂] + offset        where the block's scale is itself stored in 8 bits

The scales of a written weight stay as they are, so an element cannot leave ±absmax of its block: a larger scale would
round the 63 others anew, by far more than the update that asked for it.

On processors with AVX512-BF16 a Linear4bit in evaluation mode repacks its weight at its first forward, with scales
rounded to bfloat16, does not get them back, and fails where a row is no multiple of a block. The engine keeps its layers
from doing that, and unpacks those that have.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zo_hf.quantization.layer import TILE, QuantizedLayer, rounds_up, squares

_NESTED_BLOCK = 256


class BitsAndBytes4Bit(QuantizedLayer):
    """See above; `module` is a `bitsandbytes.nn.Linear4bit` whose weight has been quantised."""

    can_requantise = True

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        module.support_avx512bf16_for_cpu = False
        if self.bias is not None and module.compute_type_is_set:  # what its first forward would do
            self.bias.data = self.bias.data.to(module.compute_dtype)
        state = self._state
        if getattr(state, "packing_format_for_cpu", False):  # set by bitsandbytes when it packs
            _unpack(module)
        self.format = f"{self._state.quant_type} of bitsandbytes"

    @property
    def _state(self) -> Any:
        return self.module.weight.quant_state

    def storage(self) -> dict[str, Tensor]:
        state = self._state
        parts = {"weight": self.module.weight.data, "weight.absmax": state.absmax}
        return parts | {"weight.nested_absmax": state.state2.absmax} if state.nested else parts

    def linear(self, x: Tensor) -> Tensor:
        return self._product(x, self._state)

    def _product(self, x: Tensor, state: Any) -> Tensor:
        import bitsandbytes

        compute = self.module.compute_dtype or x.dtype
        return bitsandbytes.matmul_4bit(x.to(compute), self.module.weight.data, quant_state=state).to(x.dtype)

    def rows_per_tile(self) -> int:
        # Whole blocks, and whole blocks of their scales.
        unit = self._state.blocksize * (_NESTED_BLOCK if self._state.nested else 1)
        rows = unit // math.gcd(unit, self.shape[1])
        return max(rows, TILE // self.shape[1] // rows * rows)

    def dequantise(self, storage: dict[str, Tensor], start: int, stop: int) -> Tensor:
        n = self.shape[1]
        packed = _bytes(storage["weight"])[start * n // 2 : -(-stop * n // 2)]
        values = self._state.code.to(packed.device)[_unpacked(packed)[: (stop - start) * n]]
        scales = self._scales(storage, start * n, stop * n)
        return _times(values, scales, self._state.blocksize).view(stop - start, n)

    def requantise(self, storage: dict[str, Tensor], start: int, stop: int, rows: Tensor, uniform: Tensor) -> None:
        n = self.shape[1]
        scales = self._scales(storage, start * n, stop * n)
        inverse = torch.where(scales > 0, 1.0 / scales, torch.zeros_like(scales))
        codes = round_to_level(_times(rows.flatten(), inverse, self._state.blocksize), self._state.code, uniform)
        if len(codes) % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)
        _bytes(storage["weight"])[start * n // 2 : start * n // 2 + len(packed)] = packed

    @property
    def scale_shape(self) -> torch.Size:
        return self._state.absmax.shape

    def scaled_forward(
        self, original: Callable[[Tensor], Tensor], x: Tensor, log_scales: Tensor, exact: bool
    ) -> Tensor:
        scales = self._scales(self.storage(), 0, self.shape.numel())
        outputs = []
        for part, own in zip(x, log_scales, strict=True):
            state = copy.copy(self._state)
            state.absmax, state.nested, state.state2, state.offset = (scales * own.exp()).float(), False, None, None
            outputs.append(self._product(part, state))
        output = torch.stack(outputs)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def scale(self, storage: dict[str, Tensor], log_scales: Tensor, uniform: Tensor) -> tuple[float, float]:
        absmax = storage["weight.absmax"]
        exact = (self._scales(storage, 0, self.shape.numel()) * log_scales.exp().to(absmax.device)).float()
        if self._state.nested:
            centred, largest = exact - self._state.offset.to(exact.device), storage["weight.nested_absmax"]
            blocks = torch.nn.functional.pad(centred, (0, -len(centred) % _NESTED_BLOCK)).view(-1, _NESTED_BLOCK)
            lowest, highest = self._state.state2.code.aminmax()  # not opposite: bitsandbytes' map has 1 and no -1
            largest.copy_(torch.maximum(blocks.amax(1) / highest, blocks.amin(1) / lowest))
            inverse = torch.where(largest > 0, 1.0 / largest, torch.zeros_like(largest))
            absmax.copy_(round_to_level(_times(centred, inverse, _NESTED_BLOCK), self._state.state2.code, uniform))
        else:
            absmax.copy_(exact)
        return squares(self._scales(storage, 0, self.shape.numel()), exact)

    def _scales(self, storage: dict[str, Tensor], start: int, stop: int) -> Tensor:
        """absmax of the blocks of elements start..stop, float32; start begins a block."""
        first, last = start // self._state.blocksize, -(-stop // self._state.blocksize)
        absmax = storage["weight.absmax"][first:last]
        if not self._state.nested:
            return absmax.float()
        nested = storage["weight.nested_absmax"][first // _NESTED_BLOCK :]
        offset = self._state.offset.to(absmax.device)
        return _times(self._state.state2.code.to(absmax.device)[absmax.long()], nested, _NESTED_BLOCK) + offset


def round_to_level(values: Tensor, levels: Tensor, uniform: Tensor) -> Tensor:
    """Indices into `levels` of `values`, each rounded to one of its two neighbours so that the expectation is its value.

    Args:
        values: float32, (n,); beyond the outermost levels they become these.
        levels: float32, in any order.
        uniform: int32 in [0, 2**16), of n elements.
    """
    ordered, order = levels.to(values.device).sort()
    below = (torch.searchsorted(ordered, values, right=True) - 1).clamp_(0, len(ordered) - 2)
    low, high = ordered[below], ordered[below + 1]
    return order[below + rounds_up((values - low) / (high - low), uniform.flatten())]


def _times(values: Tensor, factors: Tensor, block: int) -> Tensor:
    """values: (n,), each multiplied by its block's of `factors`; the last block may be cut off."""
    whole = len(values) // block
    scaled = torch.empty_like(values, dtype=torch.float32)
    torch.mul(
        values[: whole * block].view(whole, block),
        factors[:whole, None],
        out=scaled[: whole * block].view(whole, block),
    )
    if len(values) % block:
        torch.mul(values[whole * block :], factors[whole], out=scaled[whole * block :])
    return scaled


def _bytes(packed: Tensor) -> Tensor:
    """The codes of a whole weight, uint8 (elements / 2,), whatever dtype they are stored as."""
    return packed.view(-1).view(torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    """(bytes,) -> (2 · bytes,), int64; the first element is in the high half."""
    return torch.stack((packed >> 4, packed & 15), 1).flatten().long()


def _unpack(module: Any) -> None:
    """Undo bitsandbytes' packing. Its own inverse leaves the scales of an unnested weight transposed and in bfloat16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = module.weight.quant_state
    absmax = state.absmax.t().float().reshape(-1)
    module.weight.data, state = _convert_weight_packed_for_cpu_inverse(module.weight.data, state)
    if not state.nested:
        state.absmax = absmax
    module.weight.quant_state = module.quant_state = state
