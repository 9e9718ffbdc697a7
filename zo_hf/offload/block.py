"""The parts of a model that are loaded together: a layer of a stack of layers, or one module outside of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from zo_hf.offload.hooks import held, offload_hook, offloaded_weights, put
from zo_hf.offload.weight import OffloadedWeight

_ALIGNED = 256  # bytes, as torch's allocators align


class Block:
    """Offloaded weights that a module and some of those inside of it need during its forward.

    Args:
        module: the module.
        inside: the modules whose weights belong to the block.
        weights: all offloaded weights of the model.

    Attributes:
        weights: those of the block, each once.
        nbytes: size in bytes of the memory that they need.
        device: the device that computes with them.
    """

    def __init__(self, module: nn.Module, inside: Collection[nn.Module], weights: Iterable[OffloadedWeight]) -> None:
        self.module = module
        self._places = [(place, weight) for weight in weights for place in weight.places if place[0] in inside]
        self.weights = list(dict.fromkeys(weight for _, weight in self._places))
        self.device: torch.device = self.weights[0].device
        self._starts: list[int] = []
        self.nbytes = 0
        for weight in self.weights:
            self._starts.append(self.nbytes)
            self.nbytes += -(-weight.nbytes // _ALIGNED) * _ALIGNED

    def views(self, memory: Tensor) -> list[Tensor]:
        """Return a tensor for each of `weights` in some memory, uint8 (at least nbytes,)."""
        return [
            memory[start : start + w.nbytes].view(w.placeholder.dtype).view(w.placeholder.shape)
            for start, w in zip(self._starts, self.weights, strict=True)
        ]

    @property
    def is_held(self) -> bool:
        """True if the modules hold the values, as during the forward of the block, or of one around it."""
        tensors = [held(*place) for place, _ in self._places]
        return not any(tensor is not None and tensor.is_meta for tensor in tensors)

    def hold(self, values: Sequence[Tensor]) -> None:
        """Let the modules hold values, one for each of `weights`."""
        tensors = dict(zip(self.weights, values, strict=True))
        for place, weight in self._places:
            value, like = tensors[weight], weight.placeholder
            put(*place, nn.Parameter(value, like.requires_grad) if isinstance(like, nn.Parameter) else value)

    def let_go(self) -> None:
        """Let the modules hold the placeholders again."""
        for place, weight in self._places:
            put(*place, weight.placeholder)


def blocks_of(model: nn.Module) -> tuple[list[Block], list[Block]]:
    """Return the blocks of a model: its layers, and every module on its own, each in the model's order.

    A module inside of a layer is a block, too, in case that the layer's forward is not what calls it.
    """
    weights = dict.fromkeys(offloaded_weights(model).values())
    # A hook of computed buffers alone, such as rotary embeddings, loads nothing.
    hooks = {module: hook for module in model.modules() if (hook := offload_hook(module)) and len(hook.weights_map)}
    layers = [
        Block(layer, set(layer.modules()), weights) for layer in _layers(model) if hooks.keys() & layer.modules()
    ]
    alone = [
        Block(module, set(module.modules()) if hook.place_submodules else {module}, weights)
        for module, hook in hooks.items()
    ]
    return layers, alone


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of all outermost stacks, lists of modules of one class that have a forward."""
    for child in module.children():
        kinds = {type(layer) for layer in child} if isinstance(child, nn.ModuleList) else set()
        if len(kinds) == 1 and next(iter(kinds)).forward is not nn.Module.forward:
            yield from child.children()
        else:
            yield from _layers(child)
