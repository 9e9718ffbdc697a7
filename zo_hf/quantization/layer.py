"""The interface of a quantized linear layer, whichever library made it.

    y = x · Ŵᵀ + b        Ŵ = decode(codes, scales)        (m, n)

A layer of a supported format can be read, as an exact product or as weights in float32. It can be scaled, for probes
with scales of their own. If the format is writable, it can be requantized: new weights become codes, rounded
stochastically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Elements of a weight that are decoded to float32 at a time.
TILE = 1 << 22


class QuantizedLayer:
    """A linear layer that stores its weight as codes. The base class represents a layer that can only be called.

    Args:
        module: the layer, with `in_features` and `out_features`.

    Attributes:
        shape: shape of the decoded weight, (m, n).
        stand_in: a parameter that identifies the layer and tells its device if its weight is not a parameter.
        rounds_activations: True if the module's own forward also rounds its input to integers. Probes that differ by
            1e-3 would mostly measure this rounding, so they use `linear` instead.
        can_requantize: True if new weights can be written.
        code_parts: names of the parts of `storage` that hold codes of the weight, not scales.
    """

    code_parts: tuple[str, ...] = ("weight",)
    rounds_activations = False
    can_requantize = False
    #: Name of the format in messages.
    format = "a format that can only be read"

    def __init__(self, module: Any) -> None:
        self.module = module
        self.shape = torch.Size((module.out_features, module.in_features))
        # Sites are told apart by the identity of a parameter, and GPTQ and the like have no parameter for the weight.
        device = next((b.device for b in module._buffers.values() if b is not None), None)
        self.stand_in = nn.Parameter(torch.empty(0, device=device), requires_grad=False)

    @property
    def bias(self) -> nn.Parameter | None:
        """Bias of the layer, (m,), or None."""
        return self.module._parameters.get("bias")

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer's output without rounding x. x: (..., n) -> (..., m)"""
        output = self.linear(x)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def linear(self, x: Tensor) -> Tensor:
        """Compute x · Ŵᵀ in the dtype of x. x: (..., n) -> (..., m)"""
        raise NotImplementedError(self.format)

    # The parts of the weight, either live or copied.

    def storage(self) -> dict[str, Tensor]:
        """Return the tensors that make up the weight, live, by name."""
        return {}

    def state_entries(self, storage: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the entries of the module's state dict, by name, if its weight consists of `storage`."""
        return storage

    def saved_name(self, part: str) -> str:
        """Return the name of a part of the weight in a saved file, without the module's own name before it."""
        return part

    def rows_per_tile(self) -> int:
        """Return the number of rows to decode or write at a time, such that rows that share a scale stay together."""
        return max(1, TILE // self.shape[1])

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows, (start, stop), that cover the whole weight."""
        step = self.rows_per_tile()
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])

    def dequantize(self, storage: dict[str, Tensor], start: int, stop: int) -> Tensor:
        """Decode rows start to stop - 1 of Ŵ from `storage`, float32 (stop - start, n)."""
        raise NotImplementedError(self.format)

    def make_room(self, storage: dict[str, Tensor], start: int, stop: int, rows: Tensor) -> None:
        """Enlarge the scales in `storage` that rows start to stop - 1 of a new weight have outgrown, in place.

        Codes stay as they are, so `write` must follow with the same rows.

        Args:
            storage: parts of the weight, live or copied.
            start: first row.
            stop: row after the last.
            rows: new values, float32 (stop - start, n).
        """
        raise NotImplementedError(self.format)

    def nearest(self, storage: dict[str, Tensor], start: int, stop: int) -> Callable[[Tensor, int], Tensor]:
        """Return a function that rounds a column of rows start to stop - 1 to the nearest codes under the scales in `storage`.

        Returns:
            A function of new values, float32 (stop - start,), and the index of their column. It returns the values of the
            nearest codes, which `write` writes as they are.
        """
        raise NotImplementedError(self.format)

    def requantize(self, storage: dict[str, Tensor], start: int, stop: int, rows: Tensor, uniform: Tensor) -> None:
        """Write rows start to stop - 1 of a new weight as `write` does, after `make_room` for them."""
        self.make_room(storage, start, stop, rows)
        self.write(storage, start, stop, rows, uniform)

    def write(self, storage: dict[str, Tensor], start: int, stop: int, rows: Tensor, uniform: Tensor) -> None:
        """Write rows start to stop - 1 of a new weight into `storage`, in place and rounded stochastically.

        The scales in `storage` stay, and must have room for the rows.

        Args:
            storage: parts of the weight, live or copied.
            start: first row.
            stop: row after the last.
            rows: new values, float32 (stop - start, n).
            uniform: random bits, int32 in [0, 2**16), of the shape of `rows`.
        """
        raise NotImplementedError(self.format)

    # Scales as coordinates.

    @property
    def scale_shape(self) -> torch.Size:
        """Shape of the layer's scales."""
        raise NotImplementedError(self.format)

    def scaled_forward(
        self, original: Callable[[Tensor], Tensor], x: Tensor, log_scales: Tensor, exact: bool
    ) -> Tensor:
        """Compute the layer's output for groups of inputs, each with its own scales multiplied by exp(log_scales).

        Args:
            original: computes the layer's output with its stored scales.
            x: (groups, rows, n).
            log_scales: float32 (groups, *scale_shape).
            exact: True if scales that differ by 1e-3 must on average change the output even in half precision.

        Returns:
            (groups, rows, m), in the dtype of the layer's output.
        """
        raise NotImplementedError(self.format)

    def scale(self, storage: dict[str, Tensor], log_scales: Tensor, uniform: Tensor) -> tuple[float, float]:
        """Multiply the scales in `storage` by exp(log_scales), in place.

        Args:
            storage: parts of the weight, live or copied.
            log_scales: float32 of shape `scale_shape`.
            uniform: random bits, int32 in [0, 2**16) of shape `scale_shape`, for scales that are stored as codes.

        Returns:
            The sum of the squared rounding errors of all scales, and the sum of their squared new values.
        """
        raise NotImplementedError(self.format)


def rounds_up(share: Tensor, uniform: Tensor) -> Tensor:
    """Choose the values that round to the code above and not to the one below, so that the expectation is exact.

    A value that lies on a code stays there, even if the division that gave `share` is off in its last bit.

    Args:
        share: distance from the code below, as a fraction of the distance between the two codes, in [0, 1].
        uniform: random bits, int32 in [0, 2**16), of the shape of `share`.

    Returns:
        bool of the shape of `share`.
    """
    share = torch.where((share - share.round()).abs() < 1e-5, share.round(), share)
    return share > (uniform.float() + 0.5) * 2.0**-16


def squares(stored: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the sum of the squared differences, and the sum of the squared exact values."""
    return float((stored - exact).double().square().sum()), float(exact.double().square().sum())
