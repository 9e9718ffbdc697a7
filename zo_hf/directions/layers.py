"""A few layers in each step (LeZO; Wang et al., arXiv 2410.09823; MeZO-BCD is the same with one block at a time).

    z = m ⊙ g        m is 1 on the layers of the step and 0 on the others,  g ~ N(0, I)

The layers of a step are drawn without replacement, all with the same chance. The q directions of a step share them.
E[z zᵀ] = a · I with a = (layers of a step) / (layers): an estimate is on average a times the gradient.

A layer is an entry of one of the model's outermost module lists, such as a block of a transformer. Outside of these
lists (embeddings, final norm, head), every module that holds parameters is a layer of its own. A layer that does not
move in a step is neither probed nor updated, and neither weight decay nor momentum moves it. The subspace `full` draws
no noise for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from zo_hf.directions.distribution import DirectionContext, Distribution
from zo_hf.directions.distributions import GAUSSIAN
from zo_hf.method_info import Method
from zo_hf.rng.draw import NoiseLayout, draw_half_words
from zo_hf.rng.stream import Purpose, Stream

DEFAULT_ACTIVE = 0.25


class Layers(Distribution):
    """Gaussian directions on a few layers, as in the formula above.

    Attributes:
        active: fraction of the layers that move in a step.
        layer_of: the layer of each coordinate, by the coordinate's name.

    Raises:
        ValueError: all coordinates are in one layer.
    """

    name = "layers"
    aliases: ClassVar[tuple[str, ...]] = ("lezo",)
    uses = ("active_layers",)
    about = Method("LeZO (2410.09823); MeZO-BCD", needs="a model with several layers")

    def __init__(self, context: DirectionContext) -> None:
        self.active = DEFAULT_ACTIVE if context.options.active_layers is None else context.options.active_layers
        self.layer_of = context.layers
        self._sizes = {name: coordinate.numel() for name, coordinate in context.coordinates.items()}
        self._layers = sorted(set(self.layer_of.values()))
        if len(self._layers) < 2:
            raise ValueError(
                f"zo_direction={self.name!r} chooses among layers, but all coordinates are in one, "
                f"{self._layers[0]!r}; use zo_direction='gaussian'."
            )
        self._step: tuple[int, int] | None = None
        self._chosen: set[str] = set()

    def chosen(self, stream: Stream) -> set[str]:
        """Return the names of the layers that move in the step of `stream`."""
        if self._step != (stream.seed, stream.step):
            self._chosen = self._choose(stream)
            self._step = stream.seed, stream.step
        return self._chosen

    @property
    def _count(self) -> int:
        """Number of layers that move in a step."""
        return max(1, round(self.active * len(self._layers)))

    def _choose(self, stream: Stream) -> set[str]:
        draw = Stream(stream.seed, stream.step, purpose=Purpose.LAYERS)
        words = draw_half_words(draw, "layers", 0, 4 * len(self._layers)).view(-1, 4).tolist()
        order = sorted(zip(words, self._layers, strict=True))
        return {layer for _, layer in order[: self._count]}

    def moves(self, stream: Stream, name: str) -> bool:
        return self.layer_of[name] in self.chosen(stream)

    def moving(self, stream: Stream, dimension: int) -> float:
        return sum(size for name, size in self._sizes.items() if self.moves(stream, name))

    def draw_layout(self, stream: Stream, layout: NoiseLayout, coordinates: Mapping[str, Tensor]) -> Tensor:
        z = layout.draw(stream, GAUSSIAN)
        for name, view in layout.views(z).items():
            if not self.moves(stream, name):
                view.zero_()
        return z

    def draw_slice(self, stream: Stream, name: str, start: int, values: Tensor) -> Tensor:
        if not self.moves(stream, name):
            return torch.zeros(len(values), device=values.device)
        return GAUSSIAN.draw_slice(stream, name, start, values)

    def draw_rows(self, stream: Stream, name: str, rows: Tensor, values: Tensor) -> Tensor:
        if not self.moves(stream, name):
            return torch.zeros(*rows.shape, values.shape[1], device=values.device)
        return GAUSSIAN.draw_rows(stream, name, rows, values)


def layers_of(model: nn.Module, names: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the layer of each parameter in `names`: its block, or outside of blocks the module that holds it."""
    lists = [f"{name}." if name else "" for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    layers = {}
    for name in names:
        # The first list that fits is the outermost one: named_modules yields a module before its children.
        prefix = next((prefix for prefix in lists if name.startswith(prefix)), None)
        if prefix is None:
            layers[name] = name.rpartition(".")[0]
        else:
            layers[name] = prefix + name.removeprefix(prefix).partition(".")[0]
    return layers
