"""The stack of layers of a transformer, and the first of them that moves."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

_WAY_OUT = "choose layers behind others with zo_target_modules=..., or use zo_feature_cache_gib=0"


@dataclass(frozen=True)
class LayerStack:
    """A model's layers, which call each other in turn.

    Attributes:
        model: the innermost module that gets the tokens and calls the layers.
        layers: the layers.
        front: number of layers in front of everything that moves.
    """

    model: nn.Module
    layers: nn.ModuleList
    front: int


def layer_stack(model: nn.Module, moving: Collection[nn.Module]) -> LayerStack:
    """Return the stack of a model's layers, and the number of those in front of everything that moves.

    Args:
        model: a transformers model, without wrappers of PEFT.
        moving: the modules that hold or read what moves.

    Raises:
        ValueError: the model has no single stack of layers, or its first layer moves.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"zo_feature_cache_gib needs a model of transformers, not {type(model).__name__}; use 0.")
    config = model.config
    if config.is_encoder_decoder:
        raise ValueError(
            f"zo_feature_cache_gib needs one stack of layers, and {type(model).__name__} has an encoder and a decoder; use 0."
        )
    for name in ("output_router_logits", "output_hidden_states", "output_attentions"):
        if getattr(config, name, False):
            raise ValueError(
                f"zo_feature_cache_gib leaves out the layers in front, whose outputs {name}=True asks for; set it to False in "
                "the model's config, or use zo_feature_cache_gib=0."
            )
    layers = max(
        (m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(layer) for layer in m}) == 1),
        key=_size,
        default=nn.ModuleList(),
    )
    moved = set(moving)
    front = next((i for i, layer in enumerate(layers) if moved.intersection(layer.modules())), len(layers))
    if not front:
        what = (
            f"the first layer of {type(model).__name__} moves" if layers else f"{type(model).__name__} has no layers"
        )
        raise ValueError(f"zo_feature_cache_gib has nothing to keep, because {what}; {_WAY_OUT}.")
    # Some models call a decoder inside of their base model, and others the base model.
    readers = (m for m in model.modules() if "input_ids" in inspect.signature(m.forward).parameters)
    return LayerStack([m for m in readers if any(part is layers for part in m.modules())][-1], layers, front)


def _size(layers: nn.ModuleList) -> int:
    """Return the number of modules, because a layer may hold lists of its own, such as experts."""
    return sum(1 for _ in layers.modules())
