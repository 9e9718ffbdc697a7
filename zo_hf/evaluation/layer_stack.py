"""The stack of layers of a transformer, and the first of them that moves."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


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
    inner, layers = single_stack(model, "zo_feature_cache_gib", "use zo_feature_cache_gib=0")
    moved = set(moving)
    front = next((i for i, layer in enumerate(layers) if moved.intersection(layer.modules())), len(layers))
    if not front:
        raise ValueError(
            f"zo_feature_cache_gib has nothing to keep, because the first layer of {type(model).__name__} moves; choose "
            "layers behind others with zo_target_modules=..., or use zo_feature_cache_gib=0."
        )
    return LayerStack(inner, layers, front)


def single_stack(model: nn.Module, option: str, way_out: str) -> tuple[nn.Module, nn.ModuleList]:
    """Return the innermost module of a model that gets the tokens, and the layers that it calls in turn.

    Args:
        model: a transformers model, without wrappers of PEFT.
        option: the option that needs the stack.
        way_out: how to do without it.

    Raises:
        ValueError: the model has no single stack of layers, or its config asks for the outputs of single layers.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{option} needs a model of transformers, not {type(model).__name__}; {way_out}.")
    config = model.config
    if config.is_encoder_decoder:
        raise ValueError(
            f"{option} needs one stack of layers, and {type(model).__name__} has an encoder and a decoder; {way_out}."
        )
    for name in ("output_router_logits", "output_hidden_states", "output_attentions"):
        if getattr(config, name, False):
            raise ValueError(
                f"{option} leaves out layers, whose outputs {name}=True asks for; set it to False in the model's config, or "
                f"{way_out}."
            )
    layers = max(
        (m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(layer) for layer in m}) == 1),
        key=_size,
        default=None,
    )
    if layers is None:
        raise ValueError(f"{option} needs a stack of layers, and {type(model).__name__} has none; {way_out}.")
    # Some models call a decoder inside of their base model, and others the base model.
    readers = (m for m in model.modules() if "input_ids" in inspect.signature(m.forward).parameters)
    return [m for m in readers if any(part is layers for part in m.modules())][-1], layers


def _size(layers: nn.ModuleList) -> int:
    """Return the number of modules, because a layer may hold lists of its own, such as experts."""
    return sum(1 for _ in layers.modules())
