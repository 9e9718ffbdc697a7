"""Directions of one length, uniform on the sphere, and the exact sums that make every process find the same ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import seeded
from tests.directions.test_every_distribution import Odd, whole
from zo_hf.directions import GAUSSIAN, Sphere, gram
from zo_hf.engine import ZerothOrder
from zo_hf.rng import Stream, draw_slice
from zo_hf.subspaces import Adapter, Full


def gaussian(space: Full, stream: Stream) -> np.ndarray:
    parts = [draw_slice(stream, n, 0, c.numel(), GAUSSIAN).double().numpy() for n, c in space.coordinates.items()]
    return np.concatenate(parts)


def test_z_is_the_gaussian_at_length_root_d() -> None:
    """Over all coordinates together; what a layout draws between tensors does not count."""
    space = Full(seeded(Odd))
    sphere = Sphere(space.direction_context())
    for index in range(3):
        stream = Stream(1, 2, index)
        g = gaussian(space, stream)
        z = torch.cat([t.flatten() for t in whole(sphere, space, stream).values()]).double().numpy()
        assert np.allclose(z, g * (space.dimension / (g @ g)) ** 0.5, rtol=1e-6)
        assert np.linalg.norm(z) == pytest.approx(space.dimension**0.5, rel=1e-7)


def test_the_second_moment_is_the_identity() -> None:
    """E[z zᵀ] = I by Monte Carlo over three coordinates, where the length matters most."""
    space = Full(nn.Linear(3, 1, bias=False))
    sphere, count = Sphere(space.direction_context()), 2000
    z = torch.stack(
        [torch.cat([t.flatten() for t in whole(sphere, space, Stream(0, s)).values()]) for s in range(count)]
    )
    moment = z.t() @ z / count
    assert (moment - torch.eye(3)).abs().max() < 5 * count**-0.5
    assert z.norm(dim=1).sub(3**0.5).abs().max() < 1e-5


def test_blocks_of_several_dtypes_count_together() -> None:
    """Coordinates of one device and dtype are drawn in a block of their own; the norm is that of all."""
    model = nn.Sequential(nn.Linear(5, 3).double(), nn.Linear(3, 40))
    space = Adapter(model)
    assert len(list(space.coordinate_blocks)) == 2
    space.write_gradient([1.0], lambda index: Stream(0, 0, index), Sphere(space.direction_context()))
    square = sum(float(c.grad.double().square().sum()) for c in space.coordinates.values())
    assert square == pytest.approx(space.dimension, rel=1e-6)


def test_the_gradient_norm_of_full_is_exact() -> None:
    model = seeded(Odd)
    zo = ZerothOrder(model, "full", direction="sphere")
    zo.estimate(lambda: model(torch.arange(9)).square().sum())
    (c,) = (abs(c) for _, c in zo.subspace.pending)
    z = torch.cat([t.flatten() for t in whole(zo.distribution, zo.subspace, Stream(0)).values()])
    assert float(zo.subspace.gradient_norm()) == pytest.approx(float(c * z.norm()), rel=1e-6)


def test_a_step_finds_each_norm_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = seeded(Odd), []
    compute = gram.Gram.__call__
    monkeypatch.setattr(gram.Gram, "__call__", lambda self, streams: calls.append(1) or compute(self, streams))
    zo = ZerothOrder(model, "full", direction="sphere", num_directions=3)
    zo.estimate(lambda: model(torch.arange(9)).square().sum())
    assert len(calls) == 3


def test_products_are_exact() -> None:
    """Against Python's integers, for coordinates that are drawn together and ones that are drawn in slices."""
    coordinates = {"a": torch.empty(3, 5), "b": torch.empty(30_000), "c": torch.empty(7), "d": torch.empty(16_500)}
    streams = [Stream(5, 0, index) for index in range(3)]
    found = gram.Gram(coordinates, 1 << 10)(streams)
    k = [
        [
            round(float(g) * 2**24)
            for name, c in coordinates.items()
            for g in draw_slice(stream, name, 0, c.numel(), GAUSSIAN)
        ]
        for stream in streams
    ]
    expected = [[sum(a * b for a, b in zip(k[i], k[j], strict=True)) for j in range(i + 1)] for i in range(3)]
    assert found == expected
