"""Coordinates that are few enough to have a gradient in memory, so that any torch optimizer applies to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from zo_hf.directions import Distribution, UnitVectors
from zo_hf.estimators.probe import Probe
from zo_hf.rng import NoiseLayout, Stream, StreamOf
from zo_hf.subspaces.kept_tensors import KeptTensors


class CoordinateBlock:
    """The coordinates of one dtype on one device, and the points around them.

    Args:
        coordinates: parameters by name, all of one dtype and on one device.

    Attributes:
        layout: positions of the coordinate tensors in a flat vector of length `size`, matrices before vectors.
        point: the points of the current probes, (probes, size), or None.
        tangent: directions of the current probes if they are derivatives, (probes, size), or None.
        scale: factors for the elements of every direction, (size,); None leaves directions as they are.
        learning_rates: η of every coordinate tensor, by name, for probes along the gradient.
        snapshot: earlier values of the coordinates, (size,), for probes around them.
        kept: the tensors that hold points.
    """

    scale: Tensor | None = None
    learning_rates: Mapping[str, float] = {}
    snapshot: Tensor | None = None

    def __init__(self, coordinates: Mapping[str, nn.Parameter]) -> None:
        self.coordinates = dict(sorted(coordinates.items(), key=lambda item: -item[1].ndim))
        first = next(iter(self.coordinates.values()))
        self.dtype = first.dtype
        self.layout = NoiseLayout({name: p.shape for name, p in self.coordinates.items()}, first.device)
        self.kept = KeptTensors()
        self.point: Tensor | None = None
        self.tangent: Tensor | None = None
        self._viewed: Tensor | None = None  # the point that `_views` belongs to
        self._views: dict[str, Tensor] = {}
        self._drawn: dict[Stream, Tensor] = {}
        self._drawn_from: Distribution | None = None
        self._kept = 1

    def direction(self, stream: Stream, distribution: Distribution) -> Tensor:
        """Return the direction over the coordinates of this block, (size,), in their dtype."""
        noise = self.noise(stream, distribution)
        return noise if self.scale is None else noise * self.scale

    def set_scale(self, name: str, scale: Tensor) -> None:
        """Set the factors for one coordinate tensor, of its shape; those of the others stay, and are 1 at first."""
        if self.scale is None:
            self.scale = torch.ones(self.layout.size, dtype=self.dtype, device=self.layout.device)
        self.layout.view(self.scale, name).copy_(scale)

    def noise(self, stream: Stream, distribution: Distribution) -> Tensor:
        """Return z without `scale`, (size,), in the dtype of the coordinates; the last ones drawn are cached."""
        self._draw([stream], distribution)
        return self._drawn[stream]

    def _draw(self, streams: Sequence[Stream], distribution: Distribution) -> None:
        """Draw those of the streams' z that are not cached, all together, and forget all others if room runs out."""
        if self._drawn_from is not distribution:
            self._drawn, self._drawn_from = {}, distribution
        missing = [stream for stream in dict.fromkeys(streams) if stream not in self._drawn]
        if not missing:
            return
        if len(self._drawn) + len(missing) > self._kept:
            self._drawn = {stream: self._drawn[stream] for stream in streams if stream in self._drawn}
        found = distribution.draw_layouts(missing, self.layout, self.coordinates)
        self._drawn |= {stream: z.to(self.dtype) for stream, z in zip(missing, found, strict=True)}

    def set_point(self, probes: Sequence[Probe], stream_of: StreamOf, distribution: Distribution) -> None:
        """Fill `point`, (probes, size), with ξ + scale · z; without probes it has one row, ξ itself.

        Probes are all derivatives or none. Derivatives also set `tangent`, (probes, size), to their z.
        """
        self.tangent = None
        rows = max(1, len(probes))
        # The directions come again for the gradient, and those of groups of rows for the other sign before.
        drawn = list(dict.fromkeys(p.direction for p in probes if p.direction >= 0 and (p.scale or p.derivative)))
        self._kept = max(1, len(drawn))
        self.point = self.kept.of(rows, "point", self.dtype, lambda: self._room(rows))
        with torch.no_grad():
            views = self._views_of(self.point)
            torch._foreach_copy_([view[0] for view in views.values()], list(self.coordinates.values()))
            if not isinstance(distribution, UnitVectors):
                self._draw([stream_of(direction) for direction in drawn], distribution)
            if self._is_grouped(probes, distribution):
                # The last group first, because the first row holds the present values.
                for row, probe in reversed(list(zip(self.point, probes, strict=True))):
                    z = self.direction(stream_of(probe.direction), distribution)
                    torch.add(self.point[0], z, alpha=probe.scale, out=row)
                return
            self.point[1:] = self.point[0]
            for row, probe in zip(self.point, probes, strict=False):
                if probe.at_snapshot:
                    assert self.snapshot is not None, "call take_snapshot() before a probe at the snapshot"
                    row.copy_(self.snapshot)
            if isinstance(distribution, UnitVectors):
                units = [(i, p) for i, p in enumerate(probes) if p.scale and p.direction >= 0]
                self._add_units(self.point, [(i, stream_of(p.direction), p.scale) for i, p in units], distribution)
            for row, probe in zip(self.point, probes, strict=False):
                if probe.direction < 0:
                    self._step_along_gradient(row, probe.scale)
                elif probe.scale and not isinstance(distribution, UnitVectors):
                    row.add_(self.direction(stream_of(probe.direction), distribution), alpha=probe.scale)
            tangents = [self.direction(stream_of(p.direction), distribution) for p in probes if p.derivative]
            if tangents:
                self.tangent = torch.stack(tangents) if len(tangents) > 1 else tangents[0][None]

    def _room(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.layout.size, dtype=self.dtype, device=self.layout.device)

    def _views_of(self, point: Tensor) -> dict[str, Tensor]:
        """Return every coordinate tensor at the points, (probes, *shape), by name; made once for a tensor of points."""
        if self._viewed is not point:
            self._viewed, self._views = point, self.layout.views(point)
        return self._views

    @staticmethod
    def _is_grouped(probes: Sequence[Probe], distribution: Distribution) -> bool:
        """Return True if several probes are all around the present values, along directions drawn as a whole."""
        plain = all(p.scale and p.direction >= 0 and not p.at_snapshot and not p.derivative for p in probes)
        return len(probes) > 1 and plain and not isinstance(distribution, UnitVectors)

    def take_snapshot(self) -> None:
        """Store the present values of the coordinates in `snapshot`."""
        self.snapshot = torch.zeros(self.layout.size, dtype=self.dtype, device=self.layout.device)
        with torch.no_grad():
            torch._foreach_copy_(list(self.layout.views(self.snapshot).values()), list(self.coordinates.values()))

    def _step_along_gradient(self, point: Tensor, steps: float) -> None:
        """Take `steps` steps of SGD on a copy of the coordinates, (size,), with the rounding of torch's SGD."""
        for name, coordinate in self.coordinates.items():
            if steps and coordinate.grad is not None:
                rate = self.learning_rates[name]
                self.layout.view(point, name).add_(coordinate.grad, alpha=-rate * steps)

    def at_point(self, name: str) -> Tensor:
        """Return one coordinate tensor at every probe, (probes, *shape); for derivatives, a dual tensor."""
        assert self.point is not None
        is_plain = not (self.point.requires_grad or torch.compiler.is_compiling())
        value = self._views_of(self.point)[name] if is_plain else self.layout.view(self.point, name)
        return value if self.tangent is None else forward_ad.make_dual(value, self.layout.view(self.tangent, name))

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        """Set `.grad` of every coordinate to its part of Σᵢ coefficients[i] · zᵢ, or to None if no z moves it."""
        gradient = torch.zeros(self.layout.size, dtype=self.dtype, device=self.layout.device)
        if isinstance(distribution, UnitVectors):
            moves = [(0, stream_of(index), coefficient) for index, coefficient in enumerate(coefficients)]
            self._add_units(gradient[None], moves, distribution)
        else:
            streams = [stream_of(index) for index in range(len(coefficients))]
            for first in range(0, len(streams), self._kept):
                self._draw(streams[first : first + self._kept], distribution)
                for stream, coefficient in zip(streams[first:][: self._kept], coefficients[first:], strict=False):
                    gradient.add_(self.direction(stream, distribution), alpha=coefficient)
        views = self.layout.views(gradient)
        for name, coordinate in self.coordinates.items():
            coordinate.grad = views[name] if distribution.moves(stream_of(0), name) else None

    def _add_units(self, target: Tensor, moves: Sequence[tuple[int, Stream, float]], units: UnitVectors) -> None:
        """Add scale · e_k to target[row] for each of the moves (row, stream of e_k, scale) that falls into this block.

        target: (rows, size)
        """
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


class CoordinateBlocks:
    """All coordinates of a subspace, in one block per device and dtype."""

    def __init__(self, coordinates: Mapping[str, nn.Parameter]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], dict[str, nn.Parameter]] = {}
        for name, coordinate in coordinates.items():
            groups.setdefault((coordinate.device, coordinate.dtype), {})[name] = coordinate
        self._blocks = [CoordinateBlock(group) for group in groups.values()]
        self._block_of = {name: block for block in self._blocks for name in block.coordinates}

    def of(self, name: str) -> CoordinateBlock:
        """Return the block that a coordinate tensor is in."""
        return self._block_of[name]

    def __iter__(self) -> Iterator[CoordinateBlock]:
        return iter(self._blocks)

    def set_point(self, probes: Sequence[Probe], stream_of: StreamOf, distribution: Distribution) -> None:
        """See `CoordinateBlock.set_point`."""
        for block in self._blocks:
            block.set_point(probes, stream_of, distribution)

    def set_learning_rates(self, learning_rates: Mapping[str, float]) -> None:
        """Set η of every coordinate tensor, by name, which is the length of a step along the gradient."""
        for block in self._blocks:
            block.learning_rates = learning_rates

    def at_point(self, name: str) -> Tensor:
        """See `CoordinateBlock.at_point`."""
        return self._block_of[name].at_point(name)

    def write_gradient(self, coefficients: Sequence[float], stream_of: StreamOf, distribution: Distribution) -> None:
        """See `CoordinateBlock.write_gradient`."""
        for block in self._blocks:
            block.write_gradient(coefficients, stream_of, distribution)
