"""Eight-bit integers with one scale per row: the common part of the int8 formats of bitsandbytes and torchao.

    Ŵ[i, j] = codes[i, j] · unit[i]        codes in smallest .. 127, unit > 0

A row that has outgrown its scale gets a larger one, with room for the next folds. Changing a scale rounds the whole
row anew; otherwise only the elements that have changed are rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zo_hf.quantization.layer import QuantizedLayer, rounds_up, squares

LARGEST = 127
HEADROOM = 1.0 + 1.0 / 32


class RowwiseInt8(QuantizedLayer):
    """A layer with one scale per row; a subclass says where codes and units are stored.

    Attributes:
        smallest: lowest code in use.
    """

    can_requantize = True
    smallest = -LARGEST

    def codes(self, storage: dict[str, Tensor]) -> Tensor:
        """Return the codes in `storage`, live, int8 (m, n)."""
        raise NotImplementedError

    def units(self, storage: dict[str, Tensor]) -> Tensor:
        """Return the value of code 1 in every row, float32 (m,)."""
        raise NotImplementedError

    def set_units(self, storage: dict[str, Tensor], start: int, units: Tensor) -> Tensor:
        """Store `units`, float32 (rows,), for the rows from `start` on; return them as stored, none of them less."""
        raise NotImplementedError

    def linear(self, x: Tensor) -> Tensor:
        storage = self.storage()
        output = x.new_empty(*x.shape[:-1], self.shape[0])
        for start, stop in self.tiles():
            output[..., start:stop] = torch.nn.functional.linear(x, self.dequantize(storage, start, stop).to(x.dtype))
        return output

    def dequantize(self, storage: dict[str, Tensor], start: int, stop: int) -> Tensor:
        return self.codes(storage)[start:stop].float().mul_(self.units(storage)[start:stop, None])

    def make_room(self, storage: dict[str, Tensor], start: int, stop: int, rows: Tensor) -> None:
        units = self.units(storage)[start:stop]
        needed = torch.maximum(rows.amax(1) / LARGEST, rows.amin(1) / self.smallest)
        outgrown = needed > units * (1 + 1e-6)  # a row's own largest element may exceed its code by rounding
        if outgrown.any():
            self.set_units(storage, start, torch.where(outgrown, needed * HEADROOM, units))

    def nearest(self, storage: dict[str, Tensor], start: int, stop: int) -> Callable[[Tensor, int], Tensor]:
        units = self.units(storage)[start:stop].clamp(min=torch.finfo(torch.float32).tiny)

        def rounded(values: Tensor, column: int) -> Tensor:
            return (values / units).round_().clamp_(self.smallest, LARGEST).mul_(units)

        return rounded

    def write(self, storage: dict[str, Tensor], start: int, stop: int, rows: Tensor, uniform: Tensor) -> None:
        units = self.units(storage)[start:stop]
        exact = rows / units.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        below = exact.floor()
        codes = below + rounds_up(exact - below, uniform)
        self.codes(storage)[start:stop] = codes.clamp_(self.smallest, LARGEST).to(torch.int8)

    @property
    def scale_shape(self) -> torch.Size:
        return self.shape[:1]

    def scaled_forward(
        self, original: Callable[[Tensor], Tensor], x: Tensor, log_scales: Tensor, exact: bool
    ) -> Tensor:
        # Not in half precision, in which exp(ξ) of a small ξ is 1.
        factors = log_scales.to(torch.promote_types(x.dtype, torch.float32)).exp()[:, :, None]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        is_rounded = torch.finfo(x.dtype).bits < 32 or torch.is_autocast_enabled(x.device.type)
        if exact and is_rounded:  # a rounded output times 1.001 may round to itself, so scale before rounding
            output = self._scaled_product(x, factors)
            return output if bias is None else output.add_(bias)
        output = original(x)
        if bias is None:
            return output.mul_(factors.mT)
        return output.sub_(bias).mul_(factors.mT).add_(bias)

    def _scaled_product(self, x: Tensor, factors: Tensor) -> Tensor:
        """Multiply by the scaled weights. x: (groups, rows, n), factors: (groups, m, 1) -> (groups, rows, m)"""
        storage, output = self.storage(), x.new_empty(*x.shape[:-1], self.shape[0])
        for start, stop in self.tiles():
            rows = self.dequantize(storage, start, stop)
            for part, inputs, own in zip(output, x, factors[:, start:stop], strict=True):
                part[:, start:stop] = torch.nn.functional.linear(inputs, (rows * own).to(x.dtype))
        return output

    def scale(self, storage: dict[str, Tensor], log_scales: Tensor, uniform: Tensor) -> tuple[float, float]:
        units = self.units(storage)
        exact = units * log_scales.exp().to(units.device)
        return squares(self.set_units(storage, 0, exact), exact)
