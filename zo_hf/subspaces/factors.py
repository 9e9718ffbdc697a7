"""The right-hand sides of all corrections of linear layers at the current points, in one tensor, made once a pass.

    y = x · Wᵀ + [x · V/√r, 1, 0] · [B + εU, b + εu, 0]ᵀ        (rows, width) · (width, m)

A layer's factor is B + εU with its bias as one more column. Eight columns, or a multiple, keep every row aligned to 16 bytes
in half precision. Then a layer launches two operations beside its own: a thin product, and a product that adds to y. Where
Triton runs, both are one kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zo_hf import kernels
from zo_hf.subspaces.blocks import CoordinateBlock

_ALIGNED = 8


def width_of(rank: int) -> int:
    """Return the number of columns for r columns of a factor and one for a bias."""
    return -(-(rank + 1) // _ALIGNED) * _ALIGNED


class Factors:
    """The factors of the matrices in one block of coordinates.

    Args:
        block: the coordinates; its matrices come before its vectors.
        rank: r, a divisor of 128, so that every matrix begins at a whole row.
        bias_of: the bias that shares a linear layer with a matrix, by the matrix's name; both are in the block.
    """

    def __init__(self, block: CoordinateBlock, rank: int, bias_of: Mapping[str, str]) -> None:
        layout = block.layout
        self._block, self._rank, self.bias_of = block, rank, dict(bias_of)
        self._spans = {
            name: (layout.offsets[name] // rank, shape[0])
            for name, shape in layout.shapes.items()
            if len(shape) == 2 and shape[1] == rank
        }
        self._elements = max((-(-(start + m) * rank // 128) * 128 for start, m in self._spans.values()), default=0)
        self._made: dict[torch.dtype, Tensor] = {}
        self._ones: dict[torch.dtype, Tensor] = {}
        self._biases: tuple[Tensor, Tensor] | None = None

    def refresh(self) -> None:
        """Take the block's new points, in every dtype that has been asked for."""
        for dtype in self._made:
            self._fill(dtype)

    def of(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return the factor of a matrix at the points of all groups, (groups, m, width), in the dtype of a product."""
        if dtype not in self._made:
            self._fill(dtype)
        start, rows = self._spans[name]
        return self._made[dtype][:, start : start + rows]

    def one(self, dtype: torch.dtype) -> Tensor:
        """Return what a row of the thin product begins with, (width,): 1 in the column of the bias, and else 0."""
        if dtype not in self._ones:
            self._ones[dtype] = torch.zeros(width_of(self._rank), dtype=dtype, device=self._block.layout.device)
            self._ones[dtype][self._rank] = 1.0
        return self._ones[dtype]

    def add_product(self, output: Tensor, x: Tensor, name: str, basis: Tensor, has_bias: bool) -> bool:
        """Add a layer's correction to its output by a kernel, if there is one.

        Args:
            output: y of all groups, (groups · rows, m), contiguous.
            x: inputs of the layer, (groups · rows, n), in the dtype of `output`.
            name: name of the layer's weight.
            basis: V, (n, width), in the dtype of `output`.
            has_bias: True if the layer's bias moves as well.

        Returns:
            False if there is none for this device and dtype; then nothing is done.
        """
        # A compiler would stop at the launch of a kernel, and fuses by itself.
        if torch.compiler.is_compiling() or output.dtype == torch.float64 or not kernels.run_on(output.device):
            return False
        from zo_hf.kernels.low_rank_product import add_low_rank_product

        x = x if x.stride(1) == 1 else x.contiguous()
        column = self._rank if has_bias else -1
        add_low_rank_product(output, x, basis, self.of(name, output.dtype), column)
        return True

    def _fill(self, dtype: torch.dtype) -> None:
        point = self._block.point
        assert point is not None
        shape = len(point), self._elements // self._rank, width_of(self._rank)
        made = self._block.kept.of(
            len(point), "factors", dtype, lambda: torch.zeros(shape, dtype=dtype, device=point.device)
        )
        self._made[dtype] = made
        made[..., : self._rank].copy_(point[:, : self._elements].view(len(point), -1, self._rank))
        if self.bias_of:
            rows, elements = self._places_of_biases(point.device)
            made[..., self._rank].index_copy_(1, rows, point.index_select(1, elements).to(dtype))

    def _places_of_biases(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the rows of `made` that have a bias, and the elements of the point that hold it, int64 (biases,)."""
        if self._biases is None:
            offsets = self._block.layout.offsets
            rows = [torch.arange(m) + start for start, m in (self._spans[name] for name in self.bias_of)]
            sizes = [self._spans[name][1] for name in self.bias_of]
            elements = [torch.arange(m) + offsets[bias] for m, bias in zip(sizes, self.bias_of.values(), strict=True)]
            self._biases = torch.cat(rows).to(device), torch.cat(elements).to(device)
        return self._biases
