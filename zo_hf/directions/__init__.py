"""Counter-based noise: the generator, its streams, and the distributions directions are drawn from."""

from zo_hf.directions.distributions import DISTRIBUTIONS, GAUSSIAN, RADEMACHER, Distribution
from zo_hf.directions.draw import NoiseLayout, draw_half_words, draw_rows, draw_slice
from zo_hf.directions.stream import Purpose, Stream
from zo_hf.directions.unit_vectors import ORDERS, UnitVectors, unit_vectors

__all__ = [
    "DISTRIBUTIONS",
    "GAUSSIAN",
    "ORDERS",
    "RADEMACHER",
    "Distribution",
    "NoiseLayout",
    "Purpose",
    "Stream",
    "UnitVectors",
    "draw_half_words",
    "draw_rows",
    "draw_slice",
    "unit_vectors",
]
