"""Which tensors move, and how they enter the forward."""

from __future__ import annotations

from typing import TypeGuard

from zo_hf.subspaces.adapter import Adapter
from zo_hf.subspaces.core import Core
from zo_hf.subspaces.folded import Folded
from zo_hf.subspaces.full import Full
from zo_hf.subspaces.held_full import HeldFull
from zo_hf.subspaces.low_rank import LowRank
from zo_hf.subspaces.norms import Norms
from zo_hf.subspaces.scales import Scales
from zo_hf.subspaces.subspace import Subspace

SUBSPACES: dict[str, type[Subspace]] = {kind.name: kind for kind in (LowRank, Full, Adapter, Core, Norms, Scales)}


def subspace_kind(name: str, held: bool) -> type[Subspace]:
    """The subspace of a name in `SUBSPACES`.

    Args:
        held: all its coordinates are to have a gradient in memory, which `Full` never has.
    """
    return HeldFull if held and name == Full.name else SUBSPACES[name]


def has_factors(kind: type[Subspace]) -> TypeGuard[type[LowRank]]:
    """Whether a subspace takes a rank and folds: low-rank factors, or a core."""
    return issubclass(kind, LowRank) and kind is not Norms


__all__ = [
    "SUBSPACES",
    "Adapter",
    "Core",
    "Folded",
    "Full",
    "HeldFull",
    "LowRank",
    "Norms",
    "Scales",
    "Subspace",
    "has_factors",
    "subspace_kind",
]
