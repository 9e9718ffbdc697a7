"""The adapter of a run, rebuilt around a base model from the files beside the log."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zo_hf.subspaces.adapter_config import read_adapter_config
from zo_hf.trajectory.checks import START_FILE, read_start
from zo_hf.trajectory.log import Trajectory, TrajectoryError
from zo_hf.untrusted.fields import shown

if TYPE_CHECKING:
    from peft import PeftConfig

# Sizes of an adapter that need no tensor of that size in the file of its weights, such as a number of layers.
_SMALL = 64


def with_run_adapter(model: nn.Module, trajectory: Trajectory) -> Any:
    """Wrap a base model with the adapter of a run.

    Args:
        model: the base model, a transformers model. PEFT wraps its layers in place.
        trajectory: the log, with the adapter's configuration and starting weights beside it.

    Raises:
        TrajectoryError: the configuration is not one that is handed to PEFT, does not fit the model, or describes another
            adapter than that of the starting weights. The model is then unchanged.
    """
    from peft import get_peft_model

    start = read_start(trajectory)
    try:
        config = read_adapter_config(trajectory.path.parent)
    except ValueError as error:
        raise TrajectoryError(str(error)) from error
    try:
        shapes = _shapes(model, config)
    except (NotImplementedError, RuntimeError):  # some methods read weights, which a model without any does not have
        _check_sizes(config, start, trajectory)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise TrajectoryError(
            f"PEFT cannot build the adapter beside {trajectory.path} ({shown(reason)}); wrap the model in Python and call "
            "zo_hf.trajectory.replay(model, path)."
        ) from error
    else:
        _check_shapes(shapes, start, trajectory)
    # PEFT converts half-precision adapters to float32 by default, as it did in the run.
    return get_peft_model(model, config)  # type: ignore[arg-type]


def _shapes(model: Any, config: PeftConfig) -> dict[str, torch.Size]:
    """Return the shapes of the adapter's trainable weights without making them."""
    from peft import get_peft_model

    with torch.device("meta"):
        skeleton = get_peft_model(type(model)(copy.deepcopy(model.config)), copy.deepcopy(config))
    return {name: p.shape for name, p in skeleton.named_parameters() if p.requires_grad}


def _check_shapes(shapes: Mapping[str, torch.Size], start: Mapping[str, Tensor], trajectory: Trajectory) -> None:
    path = trajectory.path.with_name(START_FILE)
    for name in sorted({*shapes, *start}):
        if name not in shapes or name not in start or shapes[name] != start[name].shape:
            raise TrajectoryError(
                f"{path} has other weights than the adapter that is described beside it, among them {shown(name)}; wrap "
                "the model in Python and call zo_hf.trajectory.replay(model, path)."
            )


def _check_sizes(config: Any, start: Mapping[str, Tensor], trajectory: Trajectory) -> None:
    largest = max([_SMALL, *(size for tensor in start.values() for size in tensor.shape)])
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_size = isinstance(value, int) and not field.name.endswith(("seed", "key"))
        if is_size and value > largest:
            raise TrajectoryError(
                f"the adapter beside {trajectory.path} has {field.name}={value}, and its starting weights have no size above "
                f"{largest}; wrap the model in Python and call zo_hf.trajectory.replay(model, path)."
            )
