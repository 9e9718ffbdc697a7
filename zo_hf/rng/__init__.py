"""Counter-based random numbers: the generator, its streams, drawing from them, and stochastic rounding."""

from zo_hf.rng.draw import Decoder, NoiseLayout, draw_half_words, draw_rows, draw_slice
from zo_hf.rng.stream import Purpose, Stream, StreamOf

__all__ = ["Decoder", "NoiseLayout", "Purpose", "Stream", "StreamOf", "draw_half_words", "draw_rows", "draw_slice"]
