"""The largest eigenvalue of the Hessian in the coordinates of a run (Lanczos 1950, with full reorthogonalization).

    q₁ random,  βₖ·qₖ₊₁ = H·qₖ - αₖ·qₖ - βₖ₋₁·qₖ₋₁        λmax ≈ the largest eigenvalue of the tridiagonal (α, β)

From forward passes alone, one product with H takes d mixed differences of four losses each,

    (H·v)ᵢ = (L(ξ + h·(eᵢ + v)) - L(ξ + h·(eᵢ - v)) - L(ξ - h·(eᵢ - v)) + L(ξ - h·(eᵢ + v))) / 4h²

With autograd, it takes one backward pass through a backward pass. At the end, the residual r = H·y - θ·y of the
approximate eigenpair (θ, y) is measured. An eigenvalue of H is within ‖r‖ of θ, including the error of the
differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_hf.directions import Distribution
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.rng import NoiseLayout, Stream
from zo_hf.rules.hizoo import Curvature

Product = Callable[[Tensor], Tensor]


class GivenDirections(Distribution):
    """Given directions in place of random ones.

    Args:
        directions: (directions, d) over all coordinates.
        coordinates: the tensors whose flattened entries, end to end, are the columns of `directions`, by name.
    """

    name = "given"

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
    """An approximate eigenvalue of the Hessian.

    Args:
        value: θ.
        error: ‖H·y - θ·y‖; an eigenvalue of H is within this distance of θ.
        products: number of products with the Hessian that were computed.
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
    """Return the largest eigenvalue of the Hessian at the current point, in the engine's coordinates.

    Args:
        zo: the engine.
        closure: evaluates the model and returns a scalar loss, always on the same batch. With several processes each
            evaluates its own rows; autograd uses the rows of this process alone.
        autograd: use backward passes, and the memory that they take. The model's operations must have second
            derivatives, so attention must be "eager".
        eps: h, the distance of a difference's points along each of two directions of length 1; None takes the fourth
            root of the machine epsilon of the coordinates' dtype.
        iterations: maximum number of Lanczos iterations.
        tolerance: stop when the estimated residual is below this fraction of the eigenvalue.
        max_forward_passes: maximum cost without autograd, which is 4·d for each iteration and for the residual.

    Raises:
        ValueError: the cost would exceed `max_forward_passes`, or autograd is requested with a rule that scales
            directions.
    """
    coordinates = zo.subspace.coordinates
    dimension = zo.subspace.dimension
    iterations = min(iterations, dimension)
    if autograd:
        if zo.rule.name == Curvature.name:
            raise ValueError(
                f"autograd=True does not include the scaling of directions by zo_rule={zo.rule.name!r}; leave it out."
            )
        with _differentiated(zo, closure) as exact:
            return lanczos(exact, dimension, iterations, tolerance, zo.seed)
    cost = 4 * dimension * (iterations + 1)
    if cost > max_forward_passes:
        raise ValueError(
            f"lambda_max would take {cost:,} forward passes for {dimension:,} coordinates, above max_forward_passes="
            f"{max_forward_passes:,}; use autograd=True, or the bound that StabilityMonitor computes from its probes."
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
            directions = GivenDirections(both.to(dtype), coordinates)
            a, b, c, d = zo.losses_at(((closure, 1.0),), probes, stream_of, directions)
            result[i] = ((a - b) - (c - d)) / (4.0 * h**2)
        return result

    return lanczos(product, dimension, iterations, tolerance, zo.seed)


def lanczos(product: Product, dimension: int, iterations: int, tolerance: float = 1e-3, seed: int = 0) -> Eigenvalue:
    """Return the largest eigenvalue of a symmetric matrix.

    Args:
        product: multiplies the matrix by a vector, (d,), float64.
        dimension: d.
        iterations: maximum number of iterations; must not exceed d.
        tolerance: stop when the estimated residual is below this fraction of the eigenvalue.
        seed: seed of the initial vector.
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
        for _ in range(2):  # a single pass leaves rounding errors, which grow over the iterations
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
        off_diagonal = torch.tensor(betas, dtype=torch.float64)
        matrix = matrix + torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    return matrix


@contextmanager
def _differentiated(zo: ZerothOrder, closure: Callable[[], Tensor]) -> Iterator[Product]:
    """Yield a function that multiplies the Hessian by a vector, (d,) float64, by autograd on the graph of one loss."""
    at_point = zo.subspace.differentiable()
    with zo.evaluator.leaving_model(zo.subspace), at_point as leaves, torch.enable_grad():
        gradients = torch.autograd.grad(closure(), leaves, create_graph=True, allow_unused=True)
        used = [(leaf, g) for leaf, g in zip(leaves, gradients, strict=True) if g is not None and g.requires_grad]

        def product(v: Tensor) -> Tensor:
            parts = dict(zip(map(id, leaves), v.split([leaf.numel() for leaf in leaves]), strict=True))
            slope = sum((g * parts[id(leaf)].view_as(leaf).to(g)).sum() for leaf, g in used)
            products = torch.autograd.grad(slope, leaves, retain_graph=True, allow_unused=True) if used else ()
            images = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, products, strict=False)]
            return torch.cat([image.flatten().double().cpu() for image in images]) if used else torch.zeros_like(v)

        yield product
