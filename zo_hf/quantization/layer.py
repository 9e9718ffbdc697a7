"""What every way of training needs to know about one quantised linear layer, whichever library made it.

    y = x · Ŵᵀ + b        Ŵ = decode(codes, scales)        (m, n)

A layer may be read (its exact product, its weights as float32), scaled (probes with scales of their own), and, where its
format can be written, requantised: rows of new weights become codes again, rounded stochastically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Elements of a weight that are float32 at a time.
TILE = 1 << 22


class QuantizedLayer:
    """One linear layer whose weight is stored as codes. This class itself is a layer that can only be called.

    Args:
        module: the layer; has `in_features` and `out_features`.

    Attributes:
        shape: (m, n) of the weight it stands for.
        rounds_activations: whether its own forward rounds its input too, to integers. Probes that differ by 1e-3 would
            mostly see that rounding, so they take `linear` instead.
        can_requantise: whether new weights can be written.
        code_parts: the parts of `storage` that are codes of the weight, and no scales.
    """

    code_parts: tuple[str, ...] = ("weight",)
    rounds_activations = False
    can_requantise = False
    #: What it is called in messages.
    format = "a format that can only be read"

    def __init__(self, module: Any) -> None:
        self.module = module
        self.shape = torch.Size((module.out_features, module.in_features))
        # For a weight that is no parameter: its device, and something that is the same as long as this object is there.
        device = next((b.device for b in module._buffers.values() if b is not None), None)
        self.stand_in = nn.Parameter(torch.empty(0, device=device), requires_grad=False)

    @property
    def bias(self) -> nn.Parameter | None:
        """Its bias, (m,)."""
        return self.module._parameters.get("bias")

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output without rounding of x. x: (..., n) -> (..., m)"""
        output = self.linear(x)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def linear(self, x: Tensor) -> Tensor:
        """x · Ŵᵀ in x's dtype. x: (..., n) -> (..., m)"""
        raise NotImplementedError(self.format)

    # The weight's parts, live or a copy of them.

    def storage(self) -> dict[str, Tensor]:
        """The tensors that the weight consists of, live, by name."""
        return {}

    def state_entries(self, storage: dict[str, Tensor]) -> dict[str, Tensor]:
        """The module's state dict has these under its own name, where its weight consists of `storage`."""
        return storage

    def saved_name(self, part: str) -> str:
        """What a part of the weight is called in a saved file, after the module's own name."""
        return part

    def rows_per_tile(self) -> int:
        """Rows that `dequantise` and `requantise` take at a time; a multiple of what shares a scale."""
        return max(1, TILE // self.shape[1])

    def tiles(self) -> Iterator[tuple[int, int]]:
        """The row ranges of the whole weight."""
        step = self.rows_per_tile()
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])

    def dequantise(self, storage: dict[str, Tensor], start: int, stop: int) -> Tensor:
        """Rows start..stop of Ŵ, float32 (stop - start, n)."""
        raise NotImplementedError(self.format)

    def requantise(self, storage: dict[str, Tensor], start: int, stop: int, rows: Tensor, uniform: Tensor) -> None:
        """Write `rows`, float32 (stop - start, n), into `storage` in place, rounded stochastically.

        Args:
            uniform: int32 in [0, 2**16), the shape of `rows`.
        """
        raise NotImplementedError(self.format)

    # Scales as coordinates.

    @property
    def scale_shape(self) -> torch.Size:
        """Of the layer's own scales."""
        raise NotImplementedError(self.format)

    def scaled_forward(
        self, original: Callable[[Tensor], Tensor], x: Tensor, log_scales: Tensor, exact: bool
    ) -> Tensor:
        """The layer's output with every scale multiplied by exp(log_scale), for groups of rows with scales of their own.

        Args:
            original: the layer's output as it is.
            x: (groups, rows, n); the result is (groups, rows, m).
            log_scales: (groups, *scale_shape), float32.
            exact: whether scales that differ by 1e-3 must differ in the output, on average, in half precision too.
        """
        raise NotImplementedError(self.format)

    def scale(self, storage: dict[str, Tensor], log_scales: Tensor, uniform: Tensor) -> tuple[float, float]:
        """Multiply the scales in `storage` by exp(log_scales), in place.

        Args:
            log_scales: float32 of `scale_shape`.
            uniform: int32 in [0, 2**16) of `scale_shape`, for scales that are themselves stored as codes.

        Returns:
            Sums over the scales of the squared rounding error and of the squared new scale.
        """
        raise NotImplementedError(self.format)


def rounds_up(share: Tensor, uniform: Tensor) -> Tensor:
    """Which values go to the code above and not to the one below, so that the expectation is the value itself.

    A value that is on a code stays there, whatever the last bit of the division that brought it here.

    Args:
        share: of the way from the code below to the one above, in [0, 1].
        uniform: int32 in [0, 2**16), the shape of `share`.
    """
    share = torch.where((share - share.round()).abs() < 1e-5, share.round(), share)
    return share > (uniform.float() + 0.5) * 2.0**-16


def squares(stored: Tensor, exact: Tensor) -> tuple[float, float]:
    """Sums of the squared difference, and of the squared exact values."""
    return float((stored - exact).double().square().sum()), float(exact.double().square().sum())
