"""Values of the coordinates at a probe."""

from __future__ import annotations

from torch import Tensor

from zo_hf.subspaces import Subspace


def moved(subspace: Subspace) -> dict[str, Tensor]:
    """Return the coordinate tensors at the probe of the present context, by name; see `Subspace.at`."""
    blocks = subspace.coordinate_blocks
    assert blocks is not None and len(subspace.probes) == 1
    return {name: blocks.at_point(name)[0] for name in subspace.coordinates}
