"""Weights that this process does not hold, because another stage of a pipeline does.

Such a parameter stays in its module, with its name, shape, dtype and device, and takes no memory: one NaN, expanded to the
shape. Whatever is computed of it has the right shape, too, and spoils every loss that depends on it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

#: The first rank that holds a parameter, for every parameter of a model whose layers are divided among processes.
_FIRST_HOLDER: WeakIdKeyDictionary = WeakIdKeyDictionary()


def let_go(parameter: nn.Parameter, device: torch.device) -> None:
    """Free the memory of a parameter, whose stand-in is on a device; parameters that are tied to it stay tied."""
    value = torch.nan if parameter.is_floating_point() else 0
    parameter.data = torch.full((), value, dtype=parameter.dtype, device=device).expand(parameter.shape)


def is_absent(tensor: Tensor) -> bool:
    """Return True if a parameter's values are in another process."""
    return tensor in _FIRST_HOLDER and tensor.numel() > 1 and not any(tensor.stride())


def has_absent(model: nn.Module) -> bool:
    """Return True if other processes hold some of a model's parameters."""
    return bool(_FIRST_HOLDER) and any(is_absent(parameter) for parameter in model.parameters())


def note_holder(parameter: nn.Parameter, rank: int) -> None:
    """Note the first rank that holds a parameter."""
    _FIRST_HOLDER[parameter] = rank


def first_holder(tensor: Tensor) -> int | None:
    """Return the first rank that holds a parameter; None if the model is not divided."""
    rank: int | None = _FIRST_HOLDER.get(tensor)
    return rank
