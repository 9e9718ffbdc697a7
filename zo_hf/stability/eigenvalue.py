"""The largest eigenvalue of the Hessian in the coordinates of a run (Lanczos 1950, with full reorthogonalisation).

    q₁ random,  βₖ·qₖ₊₁ = H·qₖ - αₖ·qₖ - βₖ₋₁·qₖ₋₁        λmax ≈ the largest eigenvalue of the tridiagonal (α, β)

One product with H is, from forward passes alone, d mixed differences of four losses each,

    (H·v)ᵢ = (L(ξ + h·(eᵢ + v)) - L(ξ + h·(eᵢ - v)) - L(ξ - h·(eᵢ - v)) + L(ξ - h·(eᵢ + v))) / 4h²

and with autograd one backward pass through a backward pass. In the end the residual r = H·y - θ·y of the eigenpair found
is measured: an eigenvalue is within ‖r‖ of θ, the error of the differences included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_hf.directions import Distribution, NoiseLayout, Stream
from zo_hf.optimizers.curvature import Curvature
from zo_hf.probes.probe import Probe
from zo_hf.zeroth_order import ZerothOrder

Product = Callable[[Tensor], Tensor]


class Along(Distribution):
    """Given directions in place of random ones.

    Args:
        directions: (directions, d) over all coordinates.
        coordinates: the tensors that they lie end to end in, by name.
    """

    name = "along"

    def __init__(self, directions: Tensor, coordinates: Mapping[str, Tensor]) -> None:
        parts = directions.split([coordinate.numel() for coordinate in coordinates.values()], 1)
        self._parts = dict(zip(coordinates, parts, strict=True))

    def draw_layout(self, stream: Stream, layout: NoiseLayout, coordinates: Mapping[str, Tensor]) -> Tensor:
        z = self._parts[next(iter(coordinates))].new_zeros(layout.size)
        for name, view in layout.views(z).items():
            view.copy_(self._parts[name][stream.direction].view(view.shape))
        return z.to(layout.device)

    def draw_slice(self, stream: Stream, name: str, start: int, values: Tensor) -> Tensor:
        return self._parts[name][stream.direction, start : start + len(values)].to(values.device, copy=True)

    def draw_rows(self, stream: Stream, name: str, rows: Tensor, values: Tensor) -> Tensor:
        return self._parts[name][stream.direction].view(values.shape).to(values.device)[rows]


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue that was found.

    Args:
        value: θ.
        error: ‖H·y - θ·y‖: an eigenvalue is no further from θ.
        products: with the Hessian, that it took.
    """

    value: float
    error: float
    products: int


def lambda_max(
    zo: ZerothOrder,
    closure: Callable[[], Tensor],
    *,
    autograd: bool = False,
    eps: float | None = None,
    iterations: int = 20,
    tolerance: float = 1e-3,
    max_forward_passes: int = 10_000,
) -> Eigenvalue:
    """The largest eigenvalue of the Hessian at the current point, in the engine's coordinates.

    Args:
        zo: an engine.
        closure: evaluates the model and returns a scalar loss, always on the same batch; with several processes each on
            its own rows, but for autograd, which sees this process's alone.
        autograd: use backward passes, with all the memory they take. The model's operations must have second derivatives:
            attention must be "eager".
        eps: h, the distance of a point of the differences along each of two directions of length 1; None takes the fourth
            root of the coordinates' last place.
        iterations: of Lanczos, at most.
        tolerance: end when the residual is estimated below this part of the eigenvalue.
        max_forward_passes: what it may cost without autograd, 4·d for each iteration and for the residual.

    Raises:
        ValueError: it would cost more, or autograd is asked for where the rule scales directions.
    """
    coordinates = zo.subspace.coordinates
    dimension = zo.subspace.dimension
    iterations = min(iterations, dimension)
    if autograd:
        if zo.rule.name == Curvature.name:
            raise ValueError(
                f"autograd=True knows nothing of how zo_rule={zo.rule.name!r} scales directions; leave it out."
            )
        with _differentiated(zo, closure) as exact:
            return lanczos(exact, dimension, iterations, tolerance, zo.seed)
    cost = 4 * dimension * (iterations + 1)
    if cost > max_forward_passes:
        raise ValueError(
            f"lambda_max would take {cost:,} forward passes for {dimension:,} coordinates, above max_forward_passes="
            f"{max_forward_passes:,}; use autograd=True, or the bound that StabilityMonitor has from its probes."
        )
    dtype = next(iter(coordinates.values())).dtype
    h = torch.finfo(dtype).eps ** 0.25 if eps is None else eps
    probes = [Probe(0, h), Probe(1, h), Probe(1, -h), Probe(0, -h)]

    def stream_of(direction: int) -> Stream:
        return Stream(zo.seed, zo.step, direction)

    def product(v: Tensor) -> Tensor:
        result = torch.zeros_like(v)
        for i in range(dimension):
            both = torch.stack((v, -v))
            both[:, i] += 1.0
            a, b, c, d = zo.losses_at(((closure, 1.0),), probes, stream_of, Along(both.to(dtype), coordinates))
            result[i] = ((a - b) - (c - d)) / (4.0 * h**2)
        return result

    return lanczos(product, dimension, iterations, tolerance, zo.seed)


def lanczos(product: Product, dimension: int, iterations: int, tolerance: float = 1e-3, seed: int = 0) -> Eigenvalue:
    """The largest eigenvalue of a symmetric matrix.

    Args:
        product: with it, of a vector (d,), float64.
        dimension: d.
        iterations: at most, and at most d.
        tolerance: end when the residual is estimated below this part of the eigenvalue.
        seed: of the vector to begin with.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(dimension, generator=generator, dtype=torch.float64)
    basis = [v / v.norm()]
    alphas: list[float] = []
    betas: list[float] = []
    while True:
        image = product(basis[-1])
        alphas.append(float(basis[-1] @ image))
        known = torch.stack(basis)
        for _ in range(2):  # once leaves rounding errors that grow
            image = image - known.t() @ (known @ image)
        beta = float(image.norm())
        values, vectors = torch.linalg.eigh(_tridiagonal(alphas, betas))
        vector = vectors[:, -1]
        estimated = beta * abs(float(vector[-1]))
        if len(alphas) == iterations or estimated <= tolerance * abs(float(values[-1])) or beta == 0.0:
            break
        betas.append(beta)
        basis.append(image / beta)
    y = known.t() @ vector
    y = y / y.norm()
    image = product(y)
    value = float(y @ image)
    return Eigenvalue(value, float((image - value * y).norm()), len(alphas) + 1)


def _tridiagonal(alphas: list[float], betas: list[float]) -> Tensor:
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    if betas:
        beside = torch.tensor(betas, dtype=torch.float64)
        matrix = matrix + torch.diag(beside, 1) + torch.diag(beside, -1)
    return matrix


@contextmanager
def _differentiated(zo: ZerothOrder, closure: Callable[[], Tensor]) -> Iterator[Product]:
    """Products with the Hessian by autograd, of vectors (d,) float64, while the graph of one loss is alive."""
    with zo.subspace.differentiable() as leaves, torch.enable_grad():
        gradients = torch.autograd.grad(closure(), leaves, create_graph=True, allow_unused=True)
        used = [(leaf, g) for leaf, g in zip(leaves, gradients, strict=True) if g is not None and g.requires_grad]

        def product(v: Tensor) -> Tensor:
            parts = dict(zip(map(id, leaves), v.split([leaf.numel() for leaf in leaves]), strict=True))
            slope = sum((g * parts[id(leaf)].view_as(leaf).to(g)).sum() for leaf, g in used)
            found = torch.autograd.grad(slope, leaves, retain_graph=True, allow_unused=True) if used else ()
            images = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=False)]
            return torch.cat([image.flatten().double().cpu() for image in images]) if used else torch.zeros_like(v)

        yield product
