"""A measurement of the noise in c that rounding makes, when a run in half precision begins.

The same loss is rounded in another way at every point. A smooth loss has nearly the same slope over ε and over ε/2:

    c(ε) = [L(ξ + ε·z) − L(ξ − ε·z)] / 2ε        c(ε) − c(ε/2) = e₁ − 2·e₂        noise² = mean (c(ε) − c(ε/2))² / 5

with e of one size σ, the noise of c(ε). It is divided by the root mean square of c. The kernel of a quantized layer may
round its inputs to a few bits, whatever the dtype of the model. Where this package does not know it, c is measured too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.evaluation.evaluate import JointLoss
from zo_hf.quantization import QuantizedLayer, coded_layers
from zo_hf.rng import Stream, StreamOf

logger = logging.getLogger(__name__)

DIRECTIONS = 3
#: What a measurement costs: four points along each of them.
FORWARD_PASSES = 4 * DIRECTIONS
#: The part of c from which on a run is warned.
NOISY = 0.1


def has_unknown_kernels(zo: ZerothOrder) -> bool:
    """Return whether the model has quantized layers of a format whose kernel this package does not know."""
    known = {module for module, layer in zo.subspace.quantized.items() if type(layer) is not QuantizedLayer}
    return bool(coded_layers(zo.model).keys() - known)


def rounding_noise(zo: ZerothOrder, closure: Callable[[], Any], weight: float | Tensor = 1.0) -> float:
    """Return the standard deviation of c's rounding divided by the root mean square of c, from 3 directions.

    It costs 12 forward passes. Every rank must call this function.

    Args:
        zo: the engine.
        closure: the loss of a batch.
        weight: the factor of this loss.
    """
    eps = zo.estimator.eps
    noise = size = 0.0
    for index in range(DIRECTIONS):
        probes = [Probe(index, scale) for scale in (eps, -eps, eps / 2, -eps / 2)]
        plus, minus, half_plus, half_minus = zo.losses_at([(closure, weight)], probes, _before_the_run(zo.seed))
        outer, inner = (plus - minus) / 2, half_plus - half_minus
        noise += (outer - inner) ** 2 / 5
        size += outer**2
    return math.sqrt(noise / size) if size else math.inf if noise else 0.0


def _before_the_run(seed: int) -> StreamOf:
    return lambda direction: Stream(seed, step=-1 - direction)


def is_rough(zo: ZerothOrder) -> bool:
    """Return whether a step of this engine may depend on rounding: in half precision, or with unknown kernels."""
    is_half = zo.evaluator.dtype_of_computation(zo.subspace, torch.float32) in (torch.float16, torch.bfloat16)
    has_distance = not zo.estimator.along_coordinates and not zo.estimator.needs_tangents
    return has_distance and (is_half or has_unknown_kernels(zo))


def warn_of_rounding(zo: ZerothOrder, closure: Callable[[], Any], weight: float | Tensor = 1.0) -> None:
    """Measure `rounding_noise` of a run that may have it, keep it in `zo.rounding_noise`, and warn if it is large."""
    if not is_rough(zo) or isinstance(closure, JointLoss):
        return
    noise = rounding_noise(zo, closure, weight)
    if math.isnan(noise):  # a loss is not finite, which the step itself says
        return
    zo.rounding_noise = noise
    if noise > NOISY:
        logger.warning(
            "rounding makes up about %.0f%% of the projected gradient at zo_eps=%g; raise zo_eps a little, or load "
            "the model in a finer dtype",
            100 * noise,
            zo.estimator.eps,
        )
