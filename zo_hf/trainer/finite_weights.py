"""Weights that are no longer finite are never saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from zo_hf.parallel.shards import is_sharded


class WeightsNotFinite(RuntimeError):
    """Raised instead of saving weights that hold NaN or infinity; the message says what to change."""


def check_finite(
    model: nn.Module, state: Mapping[str, Any] | None = None, coordinates: Mapping[str, Tensor] | None = None
) -> None:
    """Refuse to save weights that are not finite.

    Args:
        model: the model.
        state: the tensors that are saved in place of its own, by name.
        coordinates: factors that are saved as an adapter, by name.

    Raises:
        WeightsNotFinite: a parameter holds NaN or infinity.
    """
    values = {name: p if state is None else state.get(name) for name, p in model.named_parameters()}
    for name, value in (*values.items(), *(coordinates or {}).items()):
        if isinstance(value, Tensor) and not _is_finite(value):
            raise WeightsNotFinite(
                f"the weights are no longer finite ({name}), so they are not saved; train again with a smaller "
                "learning_rate, or go on from an earlier checkpoint."
            )


def _is_finite(value: Tensor) -> bool:
    # Shards are checked when they are gathered; codes of quantized weights, which are tensors of other classes, are finite.
    is_plain = type(value) in (Tensor, nn.Parameter)
    if not is_plain or not value.is_floating_point() or value.is_meta or is_sharded(value):
        return True
    return bool(value.isfinite().all())
