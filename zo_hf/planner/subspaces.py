"""The subspaces as a trace runs them: the engine's own code, with every random number left out.

Drawing noise takes a hundred operations for every tile, all of them on scratch of a few megabytes. Here a draw allocates
what it hands back and the largest scratch beside it; everything else is what training runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.directions import ELEMENTWISE, Distribution, Elementwise, NoiseLayout, Stream
from zo_hf.planner.quantised import features_out, scale_count
from zo_hf.quantization.layer import TILE as QUANTIZED_TILE
from zo_hf.subspaces import Adapter, Full, LowRank, Subspace
from zo_hf.subspaces.folded import DEFAULT_FOLD_STEPS
from zo_hf.subspaces.full import TILE
from zo_hf.subspaces.materialised import Materialised
from zo_hf.subspaces.shadow import HALF
from zo_hf.subspaces.sites import Site
from zo_hf.subspaces.subspace import StreamOf

# Float32 tensors of a tile's size that a requantising fold has at once: rows, update, random bits, codes and their like.
REQUANTISING_COPIES = 8


class TracedLayout(NoiseLayout):
    """Allocates the counters, which a layout keeps, and the noise."""

    def draw(self, stream: Stream, distribution: Elementwise) -> Tensor:
        self._blocks(distribution.elements_per_block)
        return torch.empty(self.size, device=self.device)

    def _blocks(self, per_block: int) -> tuple[Tensor, Tensor, Tensor]:
        if per_block not in self._counters:
            index, low, high = (torch.empty(self.size // per_block, dtype=torch.int64) for _ in range(3))
            self._counters[per_block] = (index, low, high)
        return self._counters[per_block]


def trace_layouts(materialised: Materialised) -> None:
    """Put a `TracedLayout` in place of every block's own."""
    for block in materialised.blocks:
        block.layout = TracedLayout(block.layout.shapes, block.layout.device)


class TracedLowRank(LowRank):
    """Low-rank coordinates.

    Args:
        model: its quantised layers are plain here, see `computed_in`.
        rank: r.
        target_modules: the only parameters that move; None means all.
        folds: whether the factors are ever added to the weights.
        requantises: whether these are quantised then.
    """

    def __init__(
        self,
        model: nn.Module,
        rank: int,
        target_modules: list[str] | None = None,
        folds: bool = True,
        requantises: bool = False,
    ) -> None:
        self._requantises = requantises
        super().__init__(model, rank, DEFAULT_FOLD_STEPS if folds else 0, target_modules=target_modules)
        trace_layouts(self._materialised)

    def draw_bases(self, step: int) -> None:
        self.drawn_at = step
        if not self.factored:
            return
        shapes = {n: torch.Size((site.matrix_shape[1], self.rank)) for n, site in self.factored.items()}
        layout = TracedLayout(shapes, torch.device("cpu"))
        flat = layout.draw(Stream(self.seed, step), ELEMENTWISE["gaussian"])
        for name, view in layout.views(flat).items():
            dtype = self.factored[name].parameter.dtype
            basis = view.to(dtype if dtype in HALF else self.coordinates[name].dtype)
            self._bases[name] = basis.t().contiguous().t()

    def fold_largest_tile(self) -> None:
        """What a fold allocates: it goes through the weights tile by tile, the largest weight's tiles being the largest."""
        site = max(self.sites, key=lambda site: site.parameter.numel())
        if self._requantises:
            elements = min(QUANTIZED_TILE, site.parameter.numel())
            _at_once = [torch.empty(elements) for _ in range(REQUANTISING_COPIES)]
        weight = site.parameter.detach()
        rows = max(1, TILE // (weight.numel() // len(weight)))
        with torch.no_grad():
            self._fold_into(weight[:rows], 0, site, 0, 1.0)


class TracedAdapter(Adapter):
    """An adapter's own weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        trace_layouts(self._materialised)


class TracedFull(Full):
    """All weights. Of the tiles of a weight the first is the largest, and none outlives the next: it stands for all."""

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
        if ids.shape[0] == 1 and groups > 1:  # positions, shared by all rows
            output = output.expand(groups * self.rows_per_probe, *output.shape[1:]).clone()
            ids = ids.expand(groups * self.rows_per_probe, *ids.shape[1:])
        for part, part_ids in zip(output.chunk(groups), ids.chunk(groups), strict=True):
            noise = _drawn(part_ids.numel() * part.shape[-1], torch.float32)  # no id occurs twice
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
    """What `draw_slice` hands back, after the tiles it is put together from and the numbers of their blocks."""
    scratch = torch.empty(count), torch.empty(-(-count // 8), dtype=torch.int64)
    noise = torch.empty(count)
    del scratch
    return noise.to(dtype).float() if dtype in HALF else noise.to(dtype)


class TracedScales(Subspace):
    """A float32 logarithm for every scale of a quantised layer: all that moves in QZO.

    nf4 has a scale within every row, so each probe dequantises the weight with scales of its own.
    """

    name = "scales"

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], base: str) -> None:
        self.model, self.base = model, base
        self.probes, self.rows_per_probe, self.clip_factor = (), 0, 1.0
        self.sites, self.visited, self.quantized = [], set(), {}
        self.coordinates = {name: nn.Parameter(torch.zeros(scale_count(m, base))) for name, m in layers.items()}
        self._holders = {module: {} for module in layers.values()}
        self._names = {module: name for name, module in layers.items()}
        self._materialised = Materialised(self.coordinates)
        trace_layouts(self._materialised)

    def moved(self, module: nn.Module) -> bool:
        return bool(self.probes)

    def forward(self, module: nn.Module, original: Callable, args: Sequence, kwargs: Mapping) -> Any:
        points = self._materialised.at_point(self._names[module])
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
        self._materialised.write_gradient(coefficients, stream_of, distribution)

    def _enter_point(self, stream_of: StreamOf, distribution: Distribution) -> None:
        self._materialised.set_point(self.probes, stream_of, distribution)
