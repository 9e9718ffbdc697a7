"""Coordinates small enough to be held as float32 tensors, with a gradient: any torch optimizer applies to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from zo_hf.directions import Distribution, NoiseLayout, Stream, UnitVectors
from zo_hf.probes.probe import Probe
from zo_hf.subspaces.subspace import StreamOf


class CoordinateBlock:
    """The coordinates on one device in one dtype, and the points around them.

    Args:
        coordinates: name to parameter; all on one device and of one dtype.

    Attributes:
        scale: what a direction is multiplied by, element by element, wherever it is used, (size,); None leaves it alone.
        learning_rates: η of every coordinate tensor, by name; for probes along the gradient.
        snapshot: earlier values of the coordinates, (size,); for probes around them.
    """

    scale: Tensor | None = None
    learning_rates: Mapping[str, float] = {}
    snapshot: Tensor | None = None

    def __init__(self, coordinates: Mapping[str, nn.Parameter]) -> None:
        self.coordinates = dict(coordinates)
        first = next(iter(self.coordinates.values()))
        self.dtype = first.dtype
        self.layout = NoiseLayout({name: p.shape for name, p in self.coordinates.items()}, first.device)
        self.point: Tensor | None = None
        self.tangent: Tensor | None = None
        self._drawn: tuple[Stream, Distribution, Tensor] | None = None

    def direction(self, stream: Stream, distribution: Distribution) -> Tensor:
        """The direction over this block's coordinates, (size,)."""
        noise = self.noise(stream, distribution)
        return noise if self.scale is None else noise * self.scale

    def noise(self, stream: Stream, distribution: Distribution) -> Tensor:
        """z as it is drawn, without `scale`, (size,); the last one is kept until the next."""
        if self._drawn is None or self._drawn[:2] != (stream, distribution):
            self._drawn = None
            z = distribution.draw_layout(stream, self.layout, self.coordinates)
            self._drawn = (stream, distribution, z.to(self.dtype))
        return self._drawn[2]

    def set_point(self, probes: Sequence[Probe], stream_of: StreamOf, distribution: Distribution) -> None:
        """Fill `point`, (probes, size), with ξ + scale · z; without probes it has one row, ξ itself.

        For a derivative, which is a probe of its own, `tangent`, (1, size), is z.
        """
        self.tangent = None
        rows = max(1, len(probes))
        if self.point is None or len(self.point) != rows:
            self.point = torch.zeros(rows, self.layout.size, dtype=self.dtype, device=self.layout.device)
        with torch.no_grad():
            views = list(self.layout.views(self.point[0]).values())
            torch._foreach_copy_(views, list(self.coordinates.values()))
            self.point[1:] = self.point[0]
            for row, probe in zip(self.point, probes, strict=False):
                if probe.at_snapshot:
                    assert self.snapshot is not None, "a rule that looks at a snapshot takes one first"
                    row.copy_(self.snapshot)
            if isinstance(distribution, UnitVectors):
                units = [(i, p) for i, p in enumerate(probes) if p.scale and p.direction >= 0]
                self._add_units(self.point, [(i, stream_of(p.direction), p.scale) for i, p in units], distribution)
            for row, probe in zip(self.point, probes, strict=False):
                if probe.direction < 0:
                    self._step_along_gradient(row, probe.scale)
                elif probe.scale and not isinstance(distribution, UnitVectors):
                    row.add_(self.direction(stream_of(probe.direction), distribution), alpha=probe.scale)
                if probe.derivative:
                    self.tangent = self.direction(stream_of(probe.direction), distribution)[None]

    def take_snapshot(self) -> None:
        """Keep the coordinates as they are now."""
        self.snapshot = torch.zeros(self.layout.size, dtype=self.dtype, device=self.layout.device)
        with torch.no_grad():
            torch._foreach_copy_(list(self.layout.views(self.snapshot).values()), list(self.coordinates.values()))

    def _step_along_gradient(self, point: Tensor, steps: float) -> None:
        """Do to a copy of the coordinates, (size,), what `steps` steps of torch's SGD would, with the same rounding."""
        for name, coordinate in self.coordinates.items():
            if steps and coordinate.grad is not None:
                rate = self.learning_rates[name]
                self.layout.view(point, name).add_(coordinate.grad, alpha=-rate * steps)

    def at_point(self, name: str) -> Tensor:
        """One coordinate tensor at every probe, (probes, *shape); for a derivative a dual tensor."""
        assert self.point is not None
        value = self.layout.view(self.point, name)
        return value if self.tangent is None else forward_ad.make_dual(value, self.layout.view(self.tangent, name))

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        """Set every coordinate's `.grad` to its part of Σᵢ coefficients[i] · zᵢ, or to None where no z moves it."""
        gradient = torch.zeros(self.layout.size, dtype=self.dtype, device=self.layout.device)
        if isinstance(distribution, UnitVectors):
            moves = [(0, stream_of(index), coefficient) for index, coefficient in enumerate(coefficients)]
            self._add_units(gradient[None], moves, distribution)
        else:
            for index, coefficient in enumerate(coefficients):
                gradient.add_(self.direction(stream_of(index), distribution), alpha=coefficient)
        for name, coordinate in self.coordinates.items():
            coordinate.grad = self.layout.view(gradient, name) if distribution.moves(stream_of(0), name) else None

    def _add_units(self, target: Tensor, moves: Sequence[tuple[int, Stream, float]], units: UnitVectors) -> None:
        """target[row] += scale · e_k where coordinate k is in this block; target: (rows, size), moves: (row, k, scale)."""
        rows, columns, scales = [], [], []
        for row, stream, scale in moves:
            name, element = units.place(stream)
            if name in self.coordinates:
                rows.append(row)
                columns.append(self.layout.offsets[name] + element)
                scales.append(scale)
        if rows:
            where = torch.tensor([rows, columns], device=target.device)
            values = torch.tensor(scales, dtype=target.dtype, device=target.device)
            target.index_put_((where[0], where[1]), values, accumulate=True)


class Materialised:
    """All coordinates of a subspace, in one block per device and dtype."""

    def __init__(self, coordinates: Mapping[str, nn.Parameter]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], dict[str, nn.Parameter]] = {}
        for name, coordinate in coordinates.items():
            groups.setdefault((coordinate.device, coordinate.dtype), {})[name] = coordinate
        self.blocks = [CoordinateBlock(group) for group in groups.values()]
        self._block_of = {name: block for block in self.blocks for name in block.coordinates}

    def set_point(self, probes: Sequence[Probe], stream_of: StreamOf, distribution: Distribution) -> None:
        """See `CoordinateBlock.set_point`."""
        for block in self.blocks:
            block.set_point(probes, stream_of, distribution)

    def set_learning_rates(self, learning_rates: Mapping[str, float]) -> None:
        """Say how far a probe along the gradient goes: η of every coordinate tensor, by name."""
        for block in self.blocks:
            block.learning_rates = learning_rates

    def at_point(self, name: str) -> Tensor:
        """See `CoordinateBlock.at_point`."""
        return self._block_of[name].at_point(name)

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        """See `CoordinateBlock.write_gradient`."""
        for block in self.blocks:
            block.write_gradient(coefficients, stream_of, distribution)
