"""Folding many weights at once: rows ← decay · rows + left · rightᵀ, in pieces that share their kernels.

A piece is some rows of a matrix, or a vector. Pieces lie end to end in scratch tensors of a bounded size, so that the
noise of all is one draw, and rounding a handful of operations. Noise depends on a weight's name and an element's index
alone, so how weights are cut and joined does not show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_hf import kernels
from zo_hf.rng import Stream
from zo_hf.rng.draw import Place, draw_half_words_of, is_launched
from zo_hf.rng.rounding import TILE, stochastic_round
from zo_hf.rng.stream import tensor_key
from zo_hf.subspaces.functional import HALF

# Elements folded at a time where operations are launched: scratch of 170 MB, on which a kernel takes longer than its launch.
WIDE_TILE = 1 << 23


@dataclass(frozen=True)
class Piece:
    """Rows of a weight and what a fold makes of them.

    Args:
        rows: the rows, (k, n), or some elements of a vector, (k,); live, in the weight's dtype.
        left: (k, r), or the coordinates of a vector, (k,); float32 or float64.
        right: (n, r), in the dtype of `left`; None for a vector.
        name: name of the weight.
        first: index of the first element in the weight.
        decay: factor on the old rows.
    """

    rows: Tensor
    left: Tensor
    right: Tensor | None
    name: str
    first: int
    decay: float


def tile_elements(device: torch.device) -> int:
    """Return the number of elements that a fold works on at a time on a device."""
    return WIDE_TILE if is_launched(device) else TILE


def cut(piece: Piece) -> Iterator[Piece]:
    """Divide a piece into parts of whole rows, each within `tile_elements` unless one row is longer."""
    length = 1 if piece.right is None else piece.rows.shape[1]
    step = max(1, tile_elements(piece.rows.device) // length)
    for start in range(0, len(piece.rows), step):
        part = slice(start, start + step)
        first = piece.first + start * length
        yield Piece(piece.rows[part], piece.left[part], piece.right, piece.name, first, piece.decay)


def write(pieces: Iterable[Piece], stream: Stream) -> None:
    """Fold the pieces, in half precision with stochastic rounding by bits of the stream."""
    for together in tiles(_left_to_torch(pieces, stream)):
        _write(together, stream)


def _left_to_torch(pieces: Iterable[Piece], stream: Stream) -> Iterator[Piece]:
    """Fold the pieces for which there is a kernel, and yield the others."""
    for piece in pieces:
        if _has_kernel(piece) and piece.rows.device == piece.left.device and piece.rows.dtype != torch.float64:
            from zo_hf.kernels.fold import fold

            key, tensor = stream.key, tensor_key(piece.name)
            fold(piece.rows, piece.left, piece.right, piece.decay, key, tensor, piece.first)
        else:
            yield piece


def _has_kernel(piece: Piece) -> bool:
    return kernels.run_on(piece.left.device) and piece.left.dtype == torch.float32


def tiles(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield lists of parts of pieces that fit into a tile and share their devices and dtypes.

    Where operations are not launched, a list has one part, because a joint one takes more scratch and saves nothing.
    """
    waiting: dict[tuple, list[Piece]] = {}
    elements: Counter[tuple] = Counter()
    for part in (part for piece in pieces for part in cut(piece)):
        kind = part.rows.device, part.rows.dtype, part.left.dtype
        room = tile_elements(part.rows.device) if is_launched(part.rows.device) else 0
        if elements[kind] and elements[kind] + part.rows.numel() > room:
            yield waiting.pop(kind)
            elements[kind] = 0
        waiting.setdefault(kind, []).append(part)
        elements[kind] += part.rows.numel()
    yield from waiting.values()


def _write(pieces: Sequence[Piece], stream: Stream) -> None:
    rows, decays = [piece.rows for piece in pieces], [piece.decay for piece in pieces]
    device, dtype = rows[0].device, rows[0].dtype
    updates = [_update(piece).to(device) for piece in pieces]
    if dtype not in HALF:
        if any(decay != 1.0 for decay in decays):
            torch._foreach_mul_(rows, decays)
        torch._foreach_add_(rows, updates)
        return
    places = [Place(piece.name, piece.first, piece.rows.numel()) for piece in pieces]
    uniform, starts = draw_half_words_of(stream, places, device)
    value = torch.empty(uniform.shape, device=device)
    views = [value[start:][: r.numel()].view(r.shape) for start, r in zip(starts, rows, strict=True)]
    torch._foreach_copy_(views, rows)
    if any(decay != 1.0 for decay in decays):
        torch._foreach_mul_(views, decays)
    torch._foreach_add_(views, updates)
    del updates
    rounded = stochastic_round(value, dtype, uniform)
    found = [rounded[start:][: r.numel()].view(r.shape) for start, r in zip(starts, rows, strict=True)]
    torch._foreach_copy_(rows, found)


def _update(piece: Piece) -> Tensor:
    """Return left · rightᵀ, of the shape of the rows; by the kernel where it folds, so that a copy elsewhere has its bits."""
    if piece.right is None:
        return piece.left
    if not _has_kernel(piece):
        return piece.left @ piece.right.t()
    from zo_hf.kernels.fold import fold

    update = piece.left.new_zeros(piece.rows.shape)
    fold(update, piece.left, piece.right, decay=1.0, key=0, tensor=0, first=0)
    return update
