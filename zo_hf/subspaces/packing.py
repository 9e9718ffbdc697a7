"""Sequences that lie end to end in the rows of a batch, and modules that see each group of them as a row.

    batch     (rows, length, ...)         a group is a run of positions; groups have different lengths
    module    (groups, longest, ...)      a group is a row, filled up with positions whose outputs are dropped

So a module whose parameters differ between groups runs as for a batch with a row for every group. All other modules see
the batch as it is, and so does the product of a layer with its own weight. A correction x · A_g of few columns is one
product for all groups without padding: x in the block of columns that belongs to its group, times all A_g.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_hf.estimators.probe import NotBatchable
from zo_hf.subspaces.functional import map_tensors


@dataclass(frozen=True)
class _Layout:
    """The positions of one kind of activations.

    Attributes:
        shape: rows and positions of a row.
        into: the position of every element of the padded groups, int64 (groups, longest).
        back: the element of the padded groups for every position, int64 (rows · length,).
        in_group: 1 for the group of every position and 0 for others, int64 (rows · length, groups).
    """

    shape: tuple[int, int]
    into: Tensor
    back: Tensor
    in_group: Tensor

    def fits(self, tensor: Tensor) -> bool:
        """Return whether a tensor has these positions: (rows, length, ...), (1, length, ...) or (rows · length, ...)."""
        rows, length = self.shape
        return tuple(tensor.shape[:2]) in (self.shape, (1, length)) or tensor.shape[0] == rows * length

    def spread(self, tensor: Tensor) -> Tensor:
        """Return a tensor that fits as (groups, longest, ...), or flat, (groups · longest, ...), if it is."""
        rows, length = self.shape
        if tensor.ndim > 1 and tensor.shape[1] == length and tensor.shape[0] in (1, rows):
            return tensor.expand(rows, *tensor.shape[1:]).flatten(0, 1)[self.into.to(tensor.device)]
        return tensor[self.into.flatten().to(tensor.device)]

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return what `spread` has been given."""
        if tuple(tensor.shape[:2]) == tuple(self.into.shape):
            return tensor.flatten(0, 1)[self.back.to(tensor.device)].unflatten(0, self.shape)
        if tensor.ndim and tensor.shape[0] == self.into.numel():
            return tensor[self.back.to(tensor.device)]
        raise NotBatchable(f"an output of shape {tuple(tensor.shape)} does not show the positions of packed sequences")


class Packing:
    """Groups of packed sequences.

    Args:
        group_of: the group of every position of the batch, int64 (rows, length), in ascending order.
        kept: the positions for which a head computes logits, (positions,), or None for all of them.
    """

    def __init__(self, group_of: Tensor, kept: Tensor | None = None) -> None:
        self._layouts = [_layout(group_of)] + ([] if kept is None else [_layout(group_of[:, kept])])

    def call(
        self, forward: Callable[..., Any], original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run a module with a row for every group, and return its output for the batch as it is.

        Args:
            forward: computes the output from an `original`, positional inputs and inputs by keyword.
            original: the forward of the module with its own parameters.
            args: positional inputs.
            kwargs: inputs by keyword.

        Raises:
            NotBatchable: an input or output does not show the positions of the sequences.
        """
        layout = self._layout_of([t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim])

        def spread(tensor: Tensor) -> Tensor:
            return layout.spread(tensor) if tensor.ndim else tensor

        own_args, own_kwargs = tuple(map_tensors(value, spread) for value in args), map_tensors(dict(kwargs), spread)

        def own(*given: Any, **named: Any) -> Any:
            # The module's own weights need no padding.
            if len(given) == len(own_args) and all(a is b for a, b in zip(given, own_args, strict=True)):
                return map_tensors(original(*args, **kwargs), spread)
            return original(*given, **named)

        return map_tensors(forward(own, own_args, own_kwargs), layout.gathered)

    def in_blocks(self, thin: Tensor, x: Tensor) -> Tensor:
        """Return (positions, groups · columns), with each position in the block of its group and zeros elsewhere.

        Args:
            thin: (positions, columns).
            x: the module's input, which shows the positions.

        Raises:
            NotBatchable: it does not.
        """
        in_group = self._layout_of([x]).in_group.to(thin.device, thin.dtype)
        return (in_group[:, :, None] * thin[:, None]).flatten(1)

    def _layout_of(self, inputs: Sequence[Tensor]) -> _Layout:
        layout = next((layout for layout in self._layouts if inputs and layout.fits(inputs[0])), None)
        if layout is None or not all(map(layout.fits, inputs)):
            shapes = ", ".join(str(tuple(t.shape)) for t in inputs) or "none"
            raise NotBatchable(f"a module's inputs ({shapes}) do not show the positions of packed sequences")
        return layout


def _layout(group_of: Tensor) -> _Layout:
    sizes = group_of.flatten().bincount()
    first = sizes.cumsum(0) - sizes
    within = torch.arange(int(sizes.max()), device=group_of.device)
    into = (first[:, None] + within).clamp(max=group_of.numel() - 1)
    place = torch.arange(group_of.numel(), device=group_of.device) - first[group_of.flatten()]
    rows, length = group_of.shape
    back = group_of.flatten() * len(within) + place
    return _Layout((rows, length), into, back, torch.nn.functional.one_hot(group_of.flatten(), len(sizes)))
