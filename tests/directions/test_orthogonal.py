"""Directions of a step that are orthogonal to each other, against NumPy's QR."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import seeded
from tests.directions.test_every_distribution import Odd, whole
from tests.directions.test_sphere import gaussian
from zo_hf.directions import Orthogonal, Sphere
from zo_hf.directions.orthogonal import inverse_factor
from zo_hf.engine import ZerothOrder
from zo_hf.rng import Stream
from zo_hf.subspaces import Full


def directions(drawer: Orthogonal, space: Full, q: int, step: int = 0) -> np.ndarray:
    return np.stack(
        [
            torch.cat([t.flatten() for t in whole(drawer, space, Stream(0, step, i)).values()]).double().numpy()
            for i in range(q)
        ]
    )


@pytest.mark.parametrize("q", [1, 2, 5, 40])
def test_directions_are_what_qr_makes_of_gaussian_ones(q: int) -> None:
    """With a positive diagonal of R, which is what makes them Haar distributed."""
    space = Full(seeded(Odd))
    z = directions(Orthogonal(space.direction_context(q)), space, q)
    assert np.allclose(z @ z.T, space.dimension * np.eye(q), atol=1e-4)
    g = np.stack([gaussian(space, Stream(0, 0, i)) for i in range(q)])
    basis, triangle = np.linalg.qr(g.T)
    expected = (basis * np.sign(np.diag(triangle))).T * space.dimension**0.5
    assert np.allclose(z, expected, atol=1e-4)


def test_one_direction_is_the_spheres() -> None:
    space = Full(seeded(Odd))
    a = whole(Orthogonal(space.direction_context()), space, Stream(0, 1, 0))
    b = whole(Sphere(space.direction_context()), space, Stream(0, 1, 0))
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-6)


def test_as_many_as_coordinates_find_the_whole_gradient() -> None:
    """1/q · Σ cᵢ zᵢ = ∇L for q = d: they are a basis. Independent directions are far from it."""
    model = nn.Linear(4, 3).double()
    slope = torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4)
    zo = ZerothOrder(model, Full(model), num_directions=15, direction="orthogonal", batched_probes=False)
    c = zo.estimate(lambda: (model(torch.eye(4, dtype=torch.float64)).t() * slope).sum()).projected_gradients
    z = [whole(zo.distribution, zo.subspace, Stream(0, 0, i)) for i in range(15)]
    mean = sum(ci * zi["weight"].double() for ci, zi in zip(c, z, strict=True)) / 15
    assert torch.allclose(mean, slope, atol=1e-4)


def test_the_second_moment_is_the_identity() -> None:
    """Of every direction on its own, the last as the first."""
    space, count = Full(nn.Linear(3, 1, bias=False)), 400
    drawer = Orthogonal(space.direction_context(3))
    z = np.stack([directions(drawer, space, 3, step) for step in range(count)])
    assert np.allclose(z @ z.transpose(0, 2, 1), 3 * np.eye(3), atol=1e-3)
    for index in range(3):
        moment = z[:, index].T @ z[:, index] / count
        assert np.abs(moment - np.eye(3)).max() < 5 * count**-0.5
    assert np.abs(z.mean(0)).max() < 5 * count**-0.5


def test_the_factor_is_the_inverse_of_choleskys() -> None:
    g = torch.randn(6, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    square = g @ g.t()
    expected = torch.linalg.inv(torch.linalg.cholesky(square))
    assert torch.allclose(inverse_factor(square.tril()), expected, rtol=1e-12)


def test_more_directions_than_coordinates_are_refused() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(
        ValueError, match=r"^zo_direction='orthogonal' cannot give zo_num_directions=4 .* 3 coordinates; use"
    ):
        ZerothOrder(model, "full", num_directions=4, direction="orthogonal")
    ZerothOrder(model, "full", num_directions=3, direction="orthogonal")
