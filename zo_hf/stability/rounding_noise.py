"""A measurement of the noise in c from layers that round their inputs.

The kernel of a quantized layer may round its inputs to a few bits. A perturbation of size ε then shifts most of them not
at all and a few by a whole step, and the difference of two losses is noise. A smooth loss has nearly the same slope over
ε and over ε/2:

    c(ε) = [L(ξ + ε·z) − L(ξ − ε·z)] / 2ε        noise ≈ |c(ε) − c(ε/2)| / max(|c(ε)|, |c(ε/2)|)

Rounding noise in L changes c(ε/2) by twice as much as c(ε).
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from typing import Any

from torch import Tensor

from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.evaluation.evaluate import JointLoss
from zo_hf.quantization import QuantizedLayer, coded_layers
from zo_hf.rng import Stream, StreamOf

logger = logging.getLogger(__name__)

DIRECTIONS = 3
NOISY = 0.5


def has_unknown_kernels(zo: ZerothOrder) -> bool:
    """Return whether the model has quantized layers of a format whose kernel this package does not know."""
    known = {module for module, layer in zo.subspace.quantized.items() if type(layer) is not QuantizedLayer}
    return bool(coded_layers(zo.model).keys() - known)


def slope_noise(zo: ZerothOrder, closure: Callable[[], Any], weight: float | Tensor = 1.0) -> float:
    """Return the relative difference between the slopes over ε and over ε/2, the median over 3 directions.

    It costs 12 forward passes. Every rank must call this function.

    Args:
        zo: the engine.
        closure: the loss of a batch.
        weight: the factor of this loss.
    """
    eps = zo.estimator.eps
    found = []
    for index in range(DIRECTIONS):
        probes = [Probe(index, scale) for scale in (eps, -eps, eps / 2, -eps / 2)]
        plus, minus, half_plus, half_minus = zo.losses_at([(closure, weight)], probes, _before_the_run(zo.seed))
        outer, inner = (plus - minus) / 2, half_plus - half_minus
        largest = max(abs(outer), abs(inner))
        found.append(abs(outer - inner) / largest if largest else 0.0)
    return statistics.median(found)


def _before_the_run(seed: int) -> StreamOf:
    return lambda direction: Stream(seed, step=-1 - direction)


def warn_of_rounding(zo: ZerothOrder, closure: Callable[[], Any], weight: float | Tensor = 1.0) -> None:
    """Measure `slope_noise` if the model has unknown kernels, and warn if it is large."""
    if not has_unknown_kernels(zo) or zo.estimator.along_coordinates or isinstance(closure, JointLoss):
        return
    noise = slope_noise(zo, closure, weight)
    if not noise <= NOISY:
        logger.warning(
            "the slope along a direction changes by %.0f%% between zo_eps=%g and half of it, so most of it is rounding in "
            "the quantized layers; raise zo_eps, or load the model in another format",
            100 * noise,
            zo.estimator.eps,
        )
