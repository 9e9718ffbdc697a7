"""bitsandbytes' Linear4bit: nf4 and fp4 (QLoRA; Dettmers et al., arXiv 2305.14314), double quantization included.

    Ŵ[block] = levels[codes] · absmax[block]                 16 levels; a block is 64 elements in a row-major weight
    absmax   = map[codes₂] · absmax₂[block₂] + offset        where the block's scale is itself stored in 8 bits

An element cannot leave ±absmax of its block. A larger scale rounds the 63 other elements anew, so a new weight gets one
only where that leaves a smaller error than cutting off what exceeds the old one.

On processors with AVX512-BF16, a Linear4bit in evaluation mode repacks its weight at its first forward. It thereby
rounds the scales to bfloat16 for good, and it fails if a row is not a multiple of a block. This class prevents the
repacking, and undoes it if it has already happened.
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
    """The layer of the formulas above; `module` is a `bitsandbytes.nn.Linear4bit` with a quantized weight."""

    can_requantize = True

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        module.support_avx512bf16_for_cpu = False
        if self.bias is not None and module.compute_type_is_set:  # as its first forward would do
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
        # A tile must hold whole blocks of elements, and whole blocks of their scales.
        unit = self._state.blocksize * (_NESTED_BLOCK if self._state.nested else 1)
        rows = unit // math.gcd(unit, self.shape[1])
        return max(rows, TILE // self.shape[1] // rows * rows)

    def dequantize(self, storage: dict[str, Tensor], start: int, stop: int) -> Tensor:
        n = self.shape[1]
        packed = _bytes(storage["weight"])[start * n // 2 : -(-stop * n // 2)]
        values = self._state.code.to(packed.device)[_unpacked(packed)[: (stop - start) * n]]
        scales = self._scales(storage, start * n, stop * n)
        return _times(values, scales, self._state.blocksize).view(stop - start, n)

    def make_room(self, storage: dict[str, Tensor], start: int, stop: int, rows: Tensor) -> None:
        n, block = self.shape[1], self._state.blocksize
        blocks = torch.nn.functional.pad(rows.flatten(), (0, -rows.numel() % block)).view(-1, block)
        largest, first = blocks.abs().amax(1), start * n // block
        absmax = storage["weight.absmax"]
        old = self._scales(storage, start * n, stop * n).clone()
        stored = absmax[first : first + len(largest)]
        kept = stored.clone()
        stored.copy_(self._nearest_codes_of_scales(storage, first, largest) if self._state.nested else largest)
        grown = self._scales(storage, start * n, stop * n)
        grows = (grown > old) & (self._squared_error(blocks, grown) < self._squared_error(blocks, old))
        stored.copy_(torch.where(grows, stored, kept))

    def _squared_error(self, blocks: Tensor, scales: Tensor) -> Tensor:
        """Return the sum of the squared errors of rounding each block to its nearest codes, (blocks,)."""
        levels, between = self._levels(blocks.device)
        inverse = _inverse(scales)
        rounded = levels[torch.bucketize(blocks * inverse[:, None], between)].mul_(scales[:, None])
        return rounded.sub_(blocks).square_().sum(1)

    def _nearest_codes_of_scales(self, storage: dict[str, Tensor], first: int, scales: Tensor) -> Tensor:
        """Return the codes nearest to new scales of the blocks from `first` on, whose own scales stay; uint8."""
        nested = storage["weight.nested_absmax"][first // _NESTED_BLOCK :]
        inverse = _inverse(nested)
        shares = _times(scales - self._state.offset.to(scales.device), inverse, _NESTED_BLOCK)
        ordered, order = self._state.state2.code.to(scales.device).sort()
        return order[torch.bucketize(shares, (ordered[1:] + ordered[:-1]) / 2)].to(torch.uint8)

    def _levels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the levels in ascending order, and the points halfway between them."""
        levels, _ = self._state.code.float().to(device).sort()
        return levels, (levels[1:] + levels[:-1]) / 2

    def nearest(self, storage: dict[str, Tensor], start: int, stop: int) -> Callable[[Tensor, int], Tensor]:
        n = self.shape[1]
        scales = self._scales(storage, start * n, stop * n).repeat_interleave(self._state.blocksize)
        scales = scales[: (stop - start) * n].view(stop - start, n).t().contiguous()
        inverse = _inverse(scales)
        levels, between = self._levels(scales.device)

        def rounded(values: Tensor, column: int) -> Tensor:
            return levels[torch.bucketize(values * inverse[column], between)].mul_(scales[column])

        return rounded

    def write(self, storage: dict[str, Tensor], start: int, stop: int, rows: Tensor, uniform: Tensor) -> None:
        n = self.shape[1]
        scales = self._scales(storage, start * n, stop * n)
        inverse = _inverse(scales)
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
            centered, largest = exact - self._state.offset.to(exact.device), storage["weight.nested_absmax"]
            blocks = torch.nn.functional.pad(centered, (0, -len(centered) % _NESTED_BLOCK)).view(-1, _NESTED_BLOCK)
            lowest, highest = self._state.state2.code.aminmax()  # not symmetric: bitsandbytes' map has 1 but not -1
            largest.copy_(torch.maximum(blocks.amax(1) / highest, blocks.amin(1) / lowest))
            inverse = _inverse(largest)
            absmax.copy_(round_to_level(_times(centered, inverse, _NESTED_BLOCK), self._state.state2.code, uniform))
        else:
            absmax.copy_(exact)
        return squares(self._scales(storage, 0, self.shape.numel()), exact)

    def _scales(self, storage: dict[str, Tensor], start: int, stop: int) -> Tensor:
        """Return absmax of the blocks of elements start to stop - 1, float32; `start` must begin a block."""
        first, last = start // self._state.blocksize, -(-stop // self._state.blocksize)
        absmax = storage["weight.absmax"][first:last]
        if not self._state.nested:
            return absmax.float()
        nested = storage["weight.nested_absmax"][first // _NESTED_BLOCK :]
        offset = self._state.offset.to(absmax.device)
        return _times(self._state.state2.code.to(absmax.device)[absmax.long()], nested, _NESTED_BLOCK) + offset


def _inverse(scales: Tensor) -> Tensor:
    """Return 1 / scales; 0 for a block of zeros."""
    return torch.where(scales > 0, 1.0 / scales, torch.zeros_like(scales))


def round_to_level(values: Tensor, levels: Tensor, uniform: Tensor) -> Tensor:
    """Round each value stochastically to one of its two neighbors in `levels`, so that the expectation is the value.

    Args:
        values: float32 (n,); a value beyond the outermost level becomes that level.
        levels: float32 (levels,), in any order.
        uniform: random bits, int32 in [0, 2**16), with n elements.

    Returns:
        Indices into `levels`, int64 (n,).
    """
    ordered, order = levels.to(values.device).sort()
    below = (torch.searchsorted(ordered, values, right=True) - 1).clamp_(0, len(ordered) - 2)
    low, high = ordered[below], ordered[below + 1]
    return order[below + rounds_up((values - low) / (high - low), uniform.flatten())]


def _times(values: Tensor, factors: Tensor, block: int) -> Tensor:
    """Multiply values, (n,), by the factors of their blocks; the last block may be incomplete."""
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
    """View the codes of a whole weight as uint8 (elements / 2,), whatever dtype stores them."""
    return packed.view(-1).view(torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    """Split bytes into two codes each, (bytes,) -> (2 · bytes,), int64; the high half comes first."""
    return torch.stack((packed >> 4, packed & 15), 1).flatten().long()


def _unpack(module: Any) -> None:
    """Undo bitsandbytes' packing; its own inverse leaves unnested scales transposed and in bfloat16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = module.weight.quant_state
    absmax = state.absmax.t().float().reshape(-1)
    module.weight.data, state = _convert_weight_packed_for_cpu_inverse(module.weight.data, state)
    if not state.nested:
        state.absmax = absmax
    module.weight.quant_state = module.quant_state = state
