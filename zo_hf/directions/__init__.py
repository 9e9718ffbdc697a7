"""Counter-based noise: the generator, its streams, and the distributions directions are drawn from."""

from zo_hf.directions.adaptive_layers import AdaptiveLayers
from zo_hf.directions.distribution import Distribution, Run
from zo_hf.directions.distributions import ELEMENTWISE, GAUSSIAN, RADEMACHER, Elementwise, Gaussian, Rademacher
from zo_hf.directions.draw import NoiseLayout, draw_half_words, draw_rows, draw_slice
from zo_hf.directions.layers import Layers
from zo_hf.directions.masked import GivenMask
from zo_hf.directions.orthogonal import Orthogonal
from zo_hf.directions.sparse import Sparse
from zo_hf.directions.sphere import Sphere
from zo_hf.directions.stream import Purpose, Stream
from zo_hf.directions.unit_vectors import ORDERS, UnitVectors, unit_vectors

DISTRIBUTIONS: dict[str, type[Distribution]] = {
    kind.name: kind for kind in (Gaussian, Rademacher, Sphere, Orthogonal, Sparse, Layers, AdaptiveLayers)
}

__all__ = [
    "DISTRIBUTIONS",
    "ELEMENTWISE",
    "GAUSSIAN",
    "ORDERS",
    "RADEMACHER",
    "AdaptiveLayers",
    "Distribution",
    "Elementwise",
    "GivenMask",
    "Layers",
    "NoiseLayout",
    "Orthogonal",
    "Purpose",
    "Run",
    "Sparse",
    "Sphere",
    "Stream",
    "UnitVectors",
    "draw_half_words",
    "draw_rows",
    "draw_slice",
    "unit_vectors",
]
