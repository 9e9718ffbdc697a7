"""Drawing noise: a slice of one tensor, some of its rows, or many small tensors at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zo_hf.directions.philox import philox4x32
from zo_hf.directions.stream import Stream, tensor_key

if TYPE_CHECKING:
    from zo_hf.directions.distributions import Elementwise

# Blocks drawn at a time: the generator's six int64 buffers of this length stay inside a core's cache.
TILE_BLOCKS = 16384


def pack(words: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Philox's four words side by side, int64 of shape (n, 2), so that a byte view reads them in order."""
    return torch.stack((words[0] | (words[1] << 32), words[2] | (words[3] << 32)), dim=-1)


def half_words(packed: Tensor) -> Tensor:
    """Uniform integers in [0, 2**16), int32 of shape (n * 8,), from packed blocks of shape (n, 2)."""
    return packed.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF).flatten()


def draw_slice(
    stream: Stream, name: str, start: int, stop: int, distribution: Elementwise, device: torch.device | str = "cpu"
) -> Tensor:
    """Elements start..stop of the noise of tensor `name`, float32 of shape (stop - start,)."""
    per_block = distribution.elements_per_block
    first = start // per_block
    blocks = torch.arange(first, -(-stop // per_block), device=device)
    noise = _decode_blocks(stream.key, name, blocks, distribution)
    return noise[start - first * per_block : stop - first * per_block]


def draw_rows(stream: Stream, name: str, rows: Tensor, row_length: int, distribution: Elementwise) -> Tensor:
    """Chosen rows of the noise of a matrix whose rows have `row_length` elements.

    Args:
        rows: row numbers, int64 of any shape; they may repeat.

    Returns:
        float32 of shape (*rows.shape, row_length), equal to those rows of the whole matrix's noise.
    """
    per_block = distribution.elements_per_block
    start = rows.flatten() * row_length
    first = start // per_block
    # A row that does not begin on a block's first element reaches into one block more.
    aligned = row_length % per_block == 0
    count = row_length // per_block if aligned else (row_length - 2) // per_block + 2
    blocks = first[:, None] + torch.arange(count, device=rows.device)
    noise = _decode_blocks(stream.key, name, blocks.flatten(), distribution).view(len(start), count * per_block)
    if not aligned:
        offset = (start - first * per_block)[:, None] + torch.arange(row_length, device=rows.device)
        noise = noise.gather(1, offset)
    return noise.view(*rows.shape, row_length)


def draw_half_words(stream: Stream, name: str, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform 16-bit integers for elements start..stop of tensor `name`, int32 of shape (stop - start,)."""
    first = start // 8
    blocks = torch.arange(first, -(-stop // 8), device=device)
    return half_words(_packed_blocks(stream.key, name, blocks))[start - first * 8 : stop - first * 8]


class NoiseLayout:
    """Many tensors laid end to end in one flat vector, so that one generator call draws noise for all of them.

    Each tensor begins on a multiple of 128 elements; what lies between is drawn too and never read.

    Args:
        shapes: the tensors' names and shapes, in order.
        device: where the noise is drawn.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        self.shapes = dict(shapes)
        self.device = device
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = self.size
            self.size += -(-shape.numel() // 128) * 128
        self._counters: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Every tensor's part of `flat`, (..., size), with the tensor's own shape after the leading dimensions."""
        return {name: self.view(flat, name) for name in self.shapes}

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The part of `flat`, (..., size), that belongs to tensor `name`: (..., *shape)."""
        offset, shape = self.offsets[name], self.shapes[name]
        return flat[..., offset : offset + shape.numel()].view(flat.shape[:-1] + shape)

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The flat vector, (size,), of these tensors, by name, and of zeros between them; differentiable."""
        parts = []
        for name, shape in self.shapes.items():
            flat = tensors[name].flatten()
            parts.append(torch.nn.functional.pad(flat, (0, -shape.numel() % 128)))
        return torch.cat(parts)

    def draw(self, stream: Stream, distribution: Elementwise) -> Tensor:
        """Noise for all tensors, float32 of shape (size,)."""
        index, low, high = self._blocks(distribution.elements_per_block)
        noise = torch.empty(self.size, device=self.device)
        tiles = noise.split(TILE_BLOCKS * distribution.elements_per_block)
        zeros = torch.zeros(min(TILE_BLOCKS, len(index)), dtype=torch.int64, device=self.device)
        for tile, c0, c2, c3 in zip(
            tiles, index.split(TILE_BLOCKS), low.split(TILE_BLOCKS), high.split(TILE_BLOCKS), strict=True
        ):
            words = philox4x32((c0, zeros[: len(c0)], c2, c3), stream.key)
            tile.copy_(distribution.decode(pack(words)))
        return noise

    def _blocks(self, per_block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Counter words of every block of the layout: block number, low and high word of its tensor's key."""
        if per_block not in self._counters:
            counts = torch.tensor([-(-shape.numel() // 128) * (128 // per_block) for shape in self.shapes.values()])
            keys = [tensor_key(name) for name in self.shapes]
            low = torch.tensor([key & 0xFFFFFFFF for key in keys]).repeat_interleave(counts)
            high = torch.tensor([key >> 32 for key in keys]).repeat_interleave(counts)
            first = (counts.cumsum(0) - counts).repeat_interleave(counts)
            index = torch.arange(len(low)) - first
            self._counters[per_block] = (index.to(self.device), low.to(self.device), high.to(self.device))
        return self._counters[per_block]


def _decode_blocks(key: int, name: str, blocks: Tensor, distribution: Elementwise) -> Tensor:
    if len(blocks) <= TILE_BLOCKS:
        return distribution.decode(_packed_blocks(key, name, blocks))
    return torch.cat([distribution.decode(_packed_blocks(key, name, tile)) for tile in blocks.split(TILE_BLOCKS)])


def _packed_blocks(key: int, name: str, blocks: Tensor) -> Tensor:
    tensor = tensor_key(name)
    low = torch.full_like(blocks, tensor & 0xFFFFFFFF)
    high = torch.full_like(blocks, tensor >> 32)
    return pack(philox4x32((blocks & 0xFFFFFFFF, blocks >> 32, low, high), key))
