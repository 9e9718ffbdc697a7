"""The trace of the Hessian of a model's loss in the coordinates of a run, from forward passes.

    κ = (L(ξ + ε·z) + L(ξ - ε·z) - 2·L(ξ)) / ε²,  z ~ N(0, I)        E κ = Tr H,  Var κ = 2·‖H‖²       (Hutchinson 1990)

If z is nonzero on some tensors only, E κ is the trace of their block of H. κ has an error of O(ε²), and a rounding
error of about 2.4·(machine epsilon)·|L|/ε². The reported standard error includes the rounding, because rounding widens
the spread of κ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from zo_hf.directions import GAUSSIAN, Distribution
from zo_hf.directions.layers import layers_of
from zo_hf.directions.masked import Masked
from zo_hf.engine import ZerothOrder
from zo_hf.estimators import SecondDifference
from zo_hf.rng import NoiseLayout, Purpose, Stream
from zo_hf.stability.measured import Measured, variance

logger = logging.getLogger(__name__)


class Restricted(Distribution):
    """The directions of a distribution on some tensors, and zero on all others.

    Args:
        distribution: the distribution that is restricted.
        names: the names of the tensors that move.
    """

    name = "only"

    def __init__(self, distribution: Distribution, names: Collection[str]) -> None:
        self._distribution, self._names = distribution, frozenset(names)

    def draw_layout(self, stream: Stream, layout: NoiseLayout, coordinates: Mapping[str, Tensor]) -> Tensor:
        z = self._distribution.draw_layout(stream, layout, coordinates)
        for name, view in layout.views(z).items():
            if name not in self._names:
                view.zero_()
        return z

    def draw_slice(self, stream: Stream, name: str, start: int, values: Tensor) -> Tensor:
        if name not in self._names:
            return torch.zeros(len(values), device=values.device)
        return self._distribution.draw_slice(stream, name, start, values)

    def draw_rows(self, stream: Stream, name: str, rows: Tensor, values: Tensor) -> Tensor:
        if name not in self._names:
            return torch.zeros(*rows.shape, values.shape[1], device=values.device)
        return self._distribution.draw_rows(stream, name, rows, values)

    def moves(self, stream: Stream, name: str) -> bool:
        return name in self._names and self._distribution.moves(stream, name)


def hessian_trace(
    zo: ZerothOrder,
    closure: Callable[[], Tensor],
    count: int = 16,
    eps: float | None = None,
    names: Collection[str] | None = None,
) -> Measured:
    """Estimate the trace of the Hessian at the current point, in 2·count + 1 forward passes.

    Args:
        zo: the engine, which defines the coordinates. With masked directions, the trace covers the entries that move.
        closure: evaluates the model and returns a scalar loss, always on the same batch.
        count: number of directions; a standard error needs at least 2.
        eps: distance of a probe; None takes the engine's. A larger distance reduces rounding error.
        names: names of coordinate tensors, for the trace of their block of the Hessian; None means all.

    Raises:
        ValueError: a name is not that of a coordinate tensor, or `names` is empty.
    """
    unknown = set(names or ()) - set(zo.subspace.coordinates)
    if unknown or (names is not None and not names):
        raise ValueError(f"names={sorted(unknown)} are not coordinate tensors; use names of zo.subspace.coordinates.")
    distribution = zo.distribution if isinstance(zo.distribution, Masked) else GAUSSIAN
    along = distribution if names is None else Restricted(distribution, names)
    around = SecondDifference(zo.estimator.eps if eps is None else eps, count)

    def stream_of(direction: int) -> Stream:
        return Stream(zo.seed, zo.step, direction, Purpose.CURVATURE)

    losses = zo.losses_at(((closure, 1.0),), around.probes(), stream_of, along)
    curvatures = around.curvatures(around.projected_gradients(losses))
    dtype = zo.evaluator.dtype_of_computation(zo.subspace, zo.evaluator.dtype)
    rounding = 6**0.5 * torch.finfo(dtype).eps * abs(losses[0]) / around.eps**2
    if 2.0 * rounding**2 > variance(curvatures):
        logger.warning(
            "the curvature along these directions is mostly rounding error of the losses, which are %s (about %.2g in each "
            "curvature); raise eps=%g, or return losses in float32 or better.",
            str(dtype).removeprefix("torch."),
            rounding,
            around.eps,
        )
    return Measured.of(curvatures)


def group_traces(
    zo: ZerothOrder,
    closure: Callable[[], Tensor],
    groups: Mapping[str, Collection[str]] | None = None,
    count: int = 16,
    eps: float | None = None,
) -> dict[str, Measured]:
    """Estimate the trace of each group's block of the Hessian, in 2·count + 1 forward passes a group.

    Groups that together hold every coordinate tensor once have traces that add up to that of the Hessian.

    Args:
        zo, closure, count, eps: as for `hessian_trace`.
        groups: the names of the coordinate tensors of each group; None makes a group of every layer, see
            `zo_hf.directions.layers`.
    """
    if groups is None:
        layer_of = layers_of(zo.model, zo.subspace.coordinates)
        groups = {layer: [n for n in layer_of if layer_of[n] == layer] for layer in dict.fromkeys(layer_of.values())}
    return {group: hessian_trace(zo, closure, count, eps, names) for group, names in groups.items()}
