"""Subspaces for a memory trace: the code that trains, without the random numbers.

Drawing noise takes a hundred operations for every tile, all on scratch tensors of a few megabytes. Here a draw
allocates only its result and the largest scratch. Everything else is the code that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.directions import ELEMENTWISE, Distribution
from zo_hf.memory.quantized import features_out, scale_count
from zo_hf.quantization.layer import TILE as QUANTIZED_TILE
from zo_hf.rng import Decoder, NoiseLayout, Stream, StreamOf
from zo_hf.subspaces import Adapter, Full, LowRank, Subspace
from zo_hf.subspaces.blocks import CoordinateBlocks
from zo_hf.subspaces.code_rounding import ROWS
from zo_hf.subspaces.folded import DEFAULT_FOLD_STEPS
from zo_hf.subspaces.full import TILE
from zo_hf.subspaces.functional import HALF
from zo_hf.subspaces.layer_inputs import LINEAR
from zo_hf.subspaces.random_tokens import LENGTH
from zo_hf.subspaces.reads import ReadWatch
from zo_hf.subspaces.sites import Site

# Number of float32 tensors of a tile's size that a requantizing fold holds at once: rows, update, random bits, codes
# etc.
REQUANTIZING_COPIES = 8

# Numbers, counted as float32, that error feedback holds for every input of a layer and for every pair of tokens while it
# is prepared: the inputs in float64 in two orders, and in float32 beside what spreads errors; three float64 matrices of
# tokens. Of these, the inputs in float32 and what spreads errors stay until the next layer.
INPUT_COPIES = 6
SQUARE_COPIES = 6
KEPT_INPUT_COPIES = 2


class TracedLayout(NoiseLayout):
    """A layout that allocates the noise, and the counters that a layout keeps, but draws nothing."""

    def draw_all(self, streams: Sequence[Stream], decoder: Decoder) -> Tensor:
        self._blocks(decoder.elements_per_block)
        return torch.empty(len(streams), self.size, device=self.device)

    def _blocks(self, per_block: int) -> tuple[Tensor, Tensor, Tensor]:
        if per_block not in self._counters:
            index, low, high = (torch.empty(self.size // per_block, dtype=torch.int64) for _ in range(3))
            self._counters[per_block] = (index, low, high)
        return self._counters[per_block]


def trace_layouts(coordinate_blocks: CoordinateBlocks) -> None:
    """Replace the layout of every block by a `TracedLayout`."""
    for block in coordinate_blocks:
        block.layout = TracedLayout(block.layout.shapes, block.layout.device)


class TracedLowRank(LowRank):
    """Low-rank coordinates for a trace.

    Args:
        model: a model whose quantized layers are represented by plain ones, see `computed_in`.
        rank: r.
        target_modules: names of the only parameters that move; None means all.
        folds: True if the factors are folded into the weights.
        coded: the layers whose weights a fold quantizes again, by `zo_fold_rounding="gptq"`.
    """

    def __init__(
        self,
        model: nn.Module,
        rank: int,
        target_modules: list[str] | None = None,
        folds: bool = True,
        coded: Sequence[nn.Module] = (),
    ) -> None:
        self._coded = coded
        super().__init__(model, rank, DEFAULT_FOLD_STEPS if folds else 0, target_modules=target_modules)
        trace_layouts(self._coordinate_blocks)

    def draw_bases(self, step: int) -> None:
        self.drawn_at = step
        if not self.factored:
            return
        shapes = {n: torch.Size((site.matrix_shape[1], self.rank)) for n, site in self.factored.items()}
        layout = TracedLayout(shapes, torch.device("cpu"))
        flat = layout.draw(Stream(self.seed, step), ELEMENTWISE["gaussian"])
        for name, view in layout.views(flat).items():
            self._bases.take(name, view)

    def _is_linear(self, module: nn.Module) -> bool:
        return type(module).forward in LINEAR  # whatever stands in for a quantized one, see `computed_in`

    def read_before_fold(self) -> None:
        """Make the forward pass in which a fold rounds the codes of every layer by the layer's inputs."""
        if not self._coded:
            return
        prepared: list[Tensor] = []  # for the last layer, whose inputs the next may read as well

        def look(module: Any, args: tuple[Any, ...]) -> None:
            columns = args[0].shape[-1]
            tokens = min(ROWS * LENGTH, columns)
            in_preparation = torch.empty(INPUT_COPIES * columns * tokens + SQUARE_COPIES * tokens**2)
            del in_preparation
            prepared[:] = [args[0], torch.empty(KEPT_INPUT_COPIES * columns * tokens)]
            _at_once = _tile_copies(module.weight)

        handles = [module.register_forward_pre_hook(look) for module in self._coded]
        with torch.no_grad():
            self.model(input_ids=torch.zeros(ROWS, LENGTH, dtype=torch.int64))
        for handle in handles:
            handle.remove()

    def fold_largest_tile(self) -> None:
        """Allocate what a fold allocates for the largest weight, which has the largest tiles."""
        site = max(self.sites, key=lambda site: site.parameter.numel())
        if self._coded:
            _tile_copies(max((module.get_parameter("weight") for module in self._coded), key=Tensor.numel))
        weight = site.parameter.detach()
        rows = max(1, TILE // (weight.numel() // len(weight)))
        with torch.no_grad():
            self._fold_into(weight[:rows], 0, site, 0, 1.0)


def _tile_copies(weight: Tensor) -> list[Tensor]:
    """Allocate what requantizing a tile of a weight holds at once."""
    return [torch.empty(min(QUANTIZED_TILE, weight.numel())) for _ in range(REQUANTIZING_COPIES)]


class TracedAdapter(Adapter):
    """Adapter weights as coordinates, for a trace."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        trace_layouts(self._coordinate_blocks)


class TracedFull(Full):
    """All weights as coordinates, for a trace.

    The first tile of a weight stands for all: it is the largest, and none is kept while the next is processed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._largest_update = 0

    def _noise(self, site: Site, direction: int, start: int, stop: int) -> Tensor:
        return _drawn(stop - start, site.parameter.dtype)

    def _linear(self, module: nn.Linear, weight: Site, bias: Site | None, x: Tensor) -> Tensor:
        output = torch.empty(*x.shape[:-1], weight.parameter.shape[0], dtype=x.dtype)
        rows = max(1, TILE // weight.parameter.shape[1])
        base = weight.parameter.detach()[:rows]
        noise = self._noise(weight, 0, 0, base.numel()).view(base.shape)
        _moved = noise.to(x.dtype) if x.dtype in HALF else torch.add(base, noise)
        return output

    def _lookup(self, weight: Site, output: Tensor, ids: Tensor) -> Tensor:
        groups = len(self.probes)
        if ids.shape[0] == 1 and groups > 1:  # position ids, which all rows share
            output = output.expand(groups * self.rows_per_probe, *output.shape[1:]).clone()
            ids = ids.expand(groups * self.rows_per_probe, *ids.shape[1:])
        for part, part_ids in zip(output.chunk(groups), ids.chunk(groups), strict=True):
            noise = _drawn(part_ids.numel() * part.shape[-1], torch.float32)  # the worst case: every id is different
            _gathered = noise.clone().to(part.dtype)
        return output

    def apply_pending(self, parameter: nn.Parameter, learning_rate: float, decay: float) -> None:
        count = min(parameter.numel(), TILE)
        if count > self._largest_update:
            self._largest_update = count
            tile = nn.Parameter(parameter.detach().view(-1)[:count])
            self.site_of[id(tile)] = self.site_of[id(parameter)]
            super().apply_pending(tile, learning_rate, decay)


def _drawn(count: int, dtype: torch.dtype) -> Tensor:
    """Allocate the scratch and the result of `draw_slice`: its tiles, the counters of their blocks, and the noise."""
    scratch = torch.empty(count), torch.empty(-(-count // 8), dtype=torch.int64)
    noise = torch.empty(count)
    del scratch
    return noise.to(dtype).float() if dtype in HALF else noise.to(dtype)


class TracedScales(Subspace):
    """The logarithm of every scale of a quantized layer as a float32 coordinate, as in QZO, for a trace.

    nf4 has scales within every row, so each probe dequantizes the weight with its own scales.
    """

    name = "scales"

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], base: str) -> None:
        self.model, self.base = model, base
        self.probes, self.rows_per_probe, self.clip_factor = (), 0, 1.0
        self.sites, self.still, self.quantized = [], set(), {}
        self.target_modules, self.exclude_modules = list(layers), None
        self.coordinates = {name: nn.Parameter(torch.zeros(scale_count(m, base))) for name, m in layers.items()}
        self._holders = {module: {} for module in layers.values()}
        self.reads = ReadWatch(self)
        self._names = {module: name for name, module in layers.items()}
        self._coordinate_blocks = CoordinateBlocks(self.coordinates)
        trace_layouts(self._coordinate_blocks)

    @property
    def takes_groups_cheaply(self) -> bool:
        return False  # as of the scales that train

    def moved(self, module: nn.Module) -> bool:
        return bool(self.probes)

    def forward(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        points = self._coordinate_blocks.at_point(self._names[module])
        if self.base == "int8":
            output = original(*args, **kwargs)
            factor = points.exp().to(output.dtype)
            return output.view(len(points), -1, features_out(module)).mul_(factor[:, None]).view(output.shape)
        outputs = []
        for point, part in zip(points, args[0].chunk(len(points)), strict=True):
            _scales = point.exp() * point
            outputs.append(original(part))
        return torch.cat(outputs)

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        self._coordinate_blocks.write_gradient(coefficients, stream_of, distribution)

    def _enter_point(self, stream_of: StreamOf, distribution: Distribution) -> None:
        self._coordinate_blocks.set_point(self.probes, stream_of, distribution)
