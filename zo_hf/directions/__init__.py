"""Distributions of the directions z, one file each."""

from zo_hf.directions.adaptive_layers import AdaptiveLayers
from zo_hf.directions.distribution import DirectionContext, Distribution
from zo_hf.directions.distributions import ELEMENTWISE, GAUSSIAN, RADEMACHER, Elementwise, Gaussian, Rademacher
from zo_hf.directions.layers import Layers, layers_of
from zo_hf.directions.masked import GivenMask
from zo_hf.directions.orthogonal import Orthogonal
from zo_hf.directions.sparse import Sparse
from zo_hf.directions.sphere import Sphere
from zo_hf.directions.unit_vectors import UnitVectors, unit_vectors

DISTRIBUTIONS: dict[str, type[Distribution]] = {
    kind.name: kind for kind in (Gaussian, Rademacher, Sphere, Orthogonal, Sparse, Layers, AdaptiveLayers)
}

__all__ = [
    "DISTRIBUTIONS",
    "ELEMENTWISE",
    "GAUSSIAN",
    "RADEMACHER",
    "AdaptiveLayers",
    "DirectionContext",
    "Distribution",
    "Elementwise",
    "GivenMask",
    "Layers",
    "Orthogonal",
    "Sparse",
    "Sphere",
    "UnitVectors",
    "layers_of",
    "unit_vectors",
]
