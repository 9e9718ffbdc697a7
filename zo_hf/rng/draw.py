"""Noise from the counter-based generator, for a slice of a tensor, some of its rows, or many tensors at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zo_hf import kernels
from zo_hf.rng.philox import philox4x32
from zo_hf.rng.philox_wide import philox_blocks
from zo_hf.rng.stream import Stream, tensor_key

# Blocks drawn at a time. On a CPU the six int64 buffers of this length, which the generator needs, fit into a core's cache.
TILE_BLOCKS = 16384
# On other devices, a kernel over these buffers of 16 MiB takes longer than its launch.
WIDE_TILE_BLOCKS = 1 << 21


def is_launched(device: torch.device) -> bool:
    """Return whether the host launches every operation on a device as a kernel, which takes longer than a small one."""
    return device.type != "cpu"


def tile_blocks(device: torch.device) -> int:
    """Return the number of blocks that are drawn at a time on a device."""
    return WIDE_TILE_BLOCKS if is_launched(device) else TILE_BLOCKS


class Decoder(Protocol):
    """Turns random bits into numbers, element by element."""

    @property
    def elements_per_block(self) -> int:
        """Number of elements that one 128-bit block gives, a divisor of 128."""

    def decode(self, packed: Tensor) -> Tensor:
        """Turn packed blocks, int64 of shape (n, 2), into float32 of shape (n * elements_per_block,)."""


def pack(words: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Join the four words of every block, int64 of shape (n,) each, into int64 of shape (n, 2).

    A view of the result as bytes then reads the words in order.
    """
    return torch.stack((words[0] | (words[1] << 32), words[2] | (words[3] << 32)), dim=-1)


def half_words(packed: Tensor) -> Tensor:
    """Split packed blocks, int64 of shape (n, 2), into uniform integers in [0, 2**16), int32 of shape (n * 8,)."""
    return packed.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF).flatten()


def draw_slice(
    stream: Stream, name: str, start: int, stop: int, decoder: Decoder, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw elements start to stop - 1 of the noise of tensor `name`, float32 of shape (stop - start,)."""
    per_block = decoder.elements_per_block
    first = start // per_block
    blocks = torch.arange(first, -(-stop // per_block), device=device)
    noise = _decode_blocks(stream.key, name, blocks, decoder)
    return noise[start - first * per_block : stop - first * per_block]


def draw_rows(stream: Stream, name: str, rows: Tensor, row_length: int, decoder: Decoder) -> Tensor:
    """Draw some rows of the noise of a matrix.

    Args:
        stream: source of the random bits.
        name: name of the matrix.
        rows: row numbers, int64 of any shape; they may repeat.
        row_length: number of columns of the matrix.
        decoder: turns the bits into elements.

    Returns:
        float32 of shape (*rows.shape, row_length), bit for bit these rows of the noise of the whole matrix.
    """
    per_block = decoder.elements_per_block
    start = rows.flatten() * row_length
    first = start // per_block
    # A row that does not start on the first element of a block extends into one more block.
    aligned = row_length % per_block == 0
    count = row_length // per_block if aligned else (row_length - 2) // per_block + 2
    blocks = first[:, None] + torch.arange(count, device=rows.device)
    noise = _decode_blocks(stream.key, name, blocks.flatten(), decoder).view(len(start), count * per_block)
    if not aligned:
        offset = (start - first * per_block)[:, None] + torch.arange(row_length, device=rows.device)
        noise = noise.gather(1, offset)
    return noise.view(*rows.shape, row_length)


def draw_half_words(stream: Stream, name: str, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw uniform integers in [0, 2**16) for elements start to stop - 1 of tensor `name`, int32 (stop - start,)."""
    first = start // 8
    blocks = torch.arange(first, -(-stop // 8), device=device)
    return half_words(_packed_blocks(stream.key, name, blocks))[start - first * 8 : stop - first * 8]


@dataclass(frozen=True)
class Place:
    """Consecutive elements of a tensor: its name, the index of the first one, and their number."""

    name: str
    first: int
    count: int


def draw_half_words_of(stream: Stream, places: Sequence[Place], device: torch.device) -> tuple[Tensor, list[int]]:
    """Draw what `draw_half_words` draws, for several places at once.

    Returns:
        int32 of shape (size,) with gaps between the places, and the index at which each place begins.
    """
    starts, counts, size = [], [], 0
    for place in places:
        starts.append(8 * size + place.first % 8)
        counts.append(-(-(place.first + place.count) // 8) - place.first // 8)
        size += counts[-1]
    number = torch.arange(size, device=device)
    low, high = torch.zeros_like(number), torch.zeros_like(number)
    # Scalars of a foreach operation are arguments of a kernel, and need no copy from the host.
    firsts = [place.first // 8 - start // 8 for place, start in zip(places, starts, strict=True)]
    keys = [tensor_key(place.name) for place in places]
    torch._foreach_add_(list(number.split(counts)), firsts)
    torch._foreach_add_(list(low.split(counts)), [key & 0xFFFFFFFF for key in keys])
    torch._foreach_add_(list(high.split(counts)), [key >> 32 for key in keys])
    drawn = torch.empty(8 * size, dtype=torch.int32, device=device)
    tile = tile_blocks(device)
    words = (number & 0xFFFFFFFF, number >> 32, low, high)
    for target, *part in zip(drawn.split(8 * tile), *(word.split(tile) for word in words), strict=True):
        target.copy_(half_words(_random_blocks(part, [stream.key])))
    return drawn, starts


class NoiseLayout:
    """Many tensors laid end to end in one flat vector, so that one generator call draws noise for all of them.

    Each tensor starts at a multiple of 128 elements. The gaps between tensors receive noise that nobody reads.

    Args:
        shapes: names and shapes of the tensors, in order.
        device: device on which the noise is drawn.

    Attributes:
        offsets: index of the first element of each tensor in the flat vector, by name.
        size: length of the flat vector.
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
        """Return the part of `flat`, (..., size), that belongs to each tensor: (..., *shape), by name."""
        views, leading = {}, flat.shape[:-1]
        # One split, because a slice for every tensor takes the host several times as long.
        parts = flat.split([-(-shape.numel() // 128) * 128 for shape in self.shapes.values()], -1)
        for part, (name, shape) in zip(parts, self.shapes.items(), strict=True):
            elements = shape.numel()
            views[name] = (part if part.shape[-1] == elements else part[..., :elements]).view(leading + shape)
        return views

    def view(self, flat: Tensor, name: str) -> Tensor:
        """Return the part of `flat`, (..., size), that belongs to tensor `name`: (..., *shape)."""
        offset, shape = self.offsets[name], self.shapes[name]
        return flat[..., offset : offset + shape.numel()].view(flat.shape[:-1] + shape)

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Lay out `tensors`, given by name, in a flat vector, (size,), with zeros in the gaps; differentiable."""
        parts = []
        for name, shape in self.shapes.items():
            flat = tensors[name].flatten()
            parts.append(torch.nn.functional.pad(flat, (0, -shape.numel() % 128)))
        return torch.cat(parts)

    def units(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the number of every 128 elements within their tensor, and the low and high word of its key: (units,)."""
        return self._blocks(128)

    def draw(self, stream: Stream, decoder: Decoder) -> Tensor:
        """Draw noise for all tensors, float32 of shape (size,)."""
        return self.draw_all([stream], decoder)[0]

    def draw_all(self, streams: Sequence[Stream], decoder: Decoder) -> Tensor:
        """Draw the noise of several streams for all tensors, float32 of shape (streams, size)."""
        keys, tile = [stream.key for stream in streams], tile_blocks(self.device)
        index, low, high = self._blocks(decoder.elements_per_block)
        above = index.new_zeros(1).expand(len(index))
        noise = torch.empty(len(keys), self.size, device=self.device)
        # A CPU draws one stream at a time, because a tile of several would not fit into its cache.
        together = max(1, tile // len(index)) if is_launched(self.device) else 1
        for first in range(0, len(keys), together):
            part = keys[first : first + together]
            blocks = tile // len(part)
            columns = noise[first : first + together].split(blocks * decoder.elements_per_block, 1)
            for target, *words in zip(
                columns, *(word.split(blocks) for word in (index, above, low, high)), strict=True
            ):
                target.copy_(decoder.decode(_random_blocks(words, part)).view_as(target))
        return noise

    def _blocks(self, per_block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return three counter words of every block: its number, and the low and high word of its tensor's key.

        Each is int64 of shape (number of blocks,).
        """
        if per_block not in self._counters:
            counts = torch.tensor([-(-shape.numel() // 128) * (128 // per_block) for shape in self.shapes.values()])
            keys = [tensor_key(name) for name in self.shapes]
            low = torch.tensor([key & 0xFFFFFFFF for key in keys]).repeat_interleave(counts)
            high = torch.tensor([key >> 32 for key in keys]).repeat_interleave(counts)
            first = (counts.cumsum(0) - counts).repeat_interleave(counts)
            index = torch.arange(len(low)) - first
            self._counters[per_block] = (index.to(self.device), low.to(self.device), high.to(self.device))
        return self._counters[per_block]


def _decode_blocks(key: int, name: str, blocks: Tensor, decoder: Decoder) -> Tensor:
    tile = tile_blocks(blocks.device)
    if len(blocks) <= tile:
        return decoder.decode(_packed_blocks(key, name, blocks))
    return torch.cat([decoder.decode(_packed_blocks(key, name, part)) for part in blocks.split(tile)])


def _packed_blocks(key: int, name: str, blocks: Tensor) -> Tensor:
    tensor = tensor_key(name)
    low = torch.full_like(blocks, tensor & 0xFFFFFFFF)
    high = torch.full_like(blocks, tensor >> 32)
    if not is_launched(blocks.device):  # frees the counters before the words are packed
        return pack(philox4x32((blocks & 0xFFFFFFFF, blocks >> 32, low, high), key))
    return _random_blocks((blocks & 0xFFFFFFFF, blocks >> 32, low, high), [key])


def _random_blocks(counter: Sequence[Tensor], keys: Sequence[int]) -> Tensor:
    """Return random blocks for every key, packed, int64 of shape (keys * n, 2).

    Args:
        counter: the four words of every block's counter, int64 (n,) each.
        keys: keys of the streams.
    """
    c0, c1, c2, c3 = counter
    if kernels.run_on(c0.device):
        from zo_hf.kernels.random_blocks import random_blocks

        return random_blocks(counter, keys)
    if is_launched(c0.device):
        return philox_blocks(torch.stack((c0, c2)), torch.stack((c3, c1)), keys).flatten(0, 1)
    drawn = [pack(philox4x32((c0, c1, c2, c3), key)) for key in keys]
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn)
