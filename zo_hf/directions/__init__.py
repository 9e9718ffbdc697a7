"""Counter-based noise: the generator, its streams, and the distributions directions are drawn from."""

from zo_hf.directions.distributions import DISTRIBUTIONS, GAUSSIAN, RADEMACHER, Distribution
from zo_hf.directions.draw import NoiseLayout, draw_half_words, draw_rows, draw_slice
from zo_hf.directions.stream import Purpose, Stream

__all__ = [
    "DISTRIBUTIONS",
    "GAUSSIAN",
    "RADEMACHER",
    "Distribution",
    "NoiseLayout",
    "Purpose",
    "Stream",
    "draw_half_words",
    "draw_rows",
    "draw_slice",
]
