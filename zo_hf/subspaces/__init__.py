"""Subspaces: the tensors that move, and the way in which they enter the forward pass."""

from __future__ import annotations

from typing import TypeGuard

from zo_hf.subspaces.adapter import Adapter
from zo_hf.subspaces.core import Core
from zo_hf.subspaces.folded import Folded
from zo_hf.subspaces.full import Full
from zo_hf.subspaces.full_in_memory import FullInMemory
from zo_hf.subspaces.low_rank import LowRank
from zo_hf.subspaces.norms import Norms
from zo_hf.subspaces.scales import Scales
from zo_hf.subspaces.subspace import Subspace

SUBSPACES: dict[str, type[Subspace]] = {kind.name: kind for kind in (LowRank, Full, Adapter, Core, Norms, Scales)}


def subspace_kind(name: str, held: bool) -> type[Subspace]:
    """Return the class of a subspace.

    Args:
        name: a name in `SUBSPACES`.
        held: True if all coordinates must have a gradient in memory, which `Full` never has.
    """
    return FullInMemory if held and name == Full.name else SUBSPACES[name]


def has_factors(kind: type[Subspace]) -> TypeGuard[type[LowRank]]:
    """Return True if a subspace has a rank and folds, as low-rank factors and a core do."""
    return issubclass(kind, LowRank) and not issubclass(kind, Norms)


__all__ = [
    "SUBSPACES",
    "Adapter",
    "Core",
    "Folded",
    "Full",
    "FullInMemory",
    "LowRank",
    "Norms",
    "Scales",
    "Subspace",
    "has_factors",
    "subspace_kind",
]
