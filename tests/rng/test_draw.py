"""Noise is a pure function of (seed, step, direction, tensor name, element), and has the distribution it says."""

import hashlib
import random
import struct
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.rng.test_philox import philox_on_integers
from zo_hf.directions import ELEMENTWISE, GAUSSIAN, RADEMACHER, Elementwise
from zo_hf.directions.distributions import _quantiles
from zo_hf.rng import NoiseLayout, Purpose, Stream, draw_half_words, draw_rows, draw_slice
from zo_hf.rng import draw as draws
from zo_hf.rng.draw import TILE_BLOCKS

EVERY_DISTRIBUTION = pytest.mark.parametrize("distribution", ELEMENTWISE.values(), ids=ELEMENTWISE)
STREAM = Stream(seed=11, step=5, direction=2)
WHOLE = 3000

GOLDEN_KEY = 12852684410266231726
GOLDEN_HALF_WORDS = [11148, 5079, 110, 19886, 189, 34886, 15184, 60899, 58690, 25435]
GOLDEN_SIGNS = [1, 1, -1, -1, 1, 1, 1, -1, -1, -1, 1, -1, 1, -1, 1, 1]
GOLDEN_NORMALS = [-1000058, -1491134, -3074038, -539520]  # times 2**20


def draw(stream: Stream = STREAM, name: str = "w", size: int = WHOLE, distribution: Elementwise = GAUSSIAN) -> Tensor:
    return draw_slice(stream, name, 0, size, distribution)


# What the noise depends on.


@EVERY_DISTRIBUTION
@settings(max_examples=60, deadline=None)
@given(bounds=st.tuples(st.integers(0, WHOLE), st.integers(0, WHOLE)))
def test_a_slice_is_that_part_of_the_whole(distribution: Elementwise, bounds: tuple[int, int]) -> None:
    start, stop = sorted(bounds)
    part = draw_slice(STREAM, "w", start, stop, distribution)
    assert part.dtype == torch.float32
    assert torch.equal(part, draw(distribution=distribution)[start:stop])


@EVERY_DISTRIBUTION
def test_a_slice_across_tiles_is_that_part_of_the_whole(distribution: Elementwise) -> None:
    """The generator works a tile of blocks at a time; no seam shows."""
    seam = TILE_BLOCKS * distribution.elements_per_block
    whole = draw_slice(STREAM, "w", 0, seam + 300, distribution)
    assert torch.equal(whole[seam - 100 : seam + 99], draw_slice(STREAM, "w", seam - 100, seam + 99, distribution))


@EVERY_DISTRIBUTION
def test_elements_beyond_the_32_bit_range_have_noise_of_their_own(distribution: Elementwise) -> None:
    """A block number above 2**32 reaches the second counter word instead of wrapping to the first blocks."""
    far = distribution.elements_per_block << 32
    assert not torch.equal(draw_slice(STREAM, "w", far, far + 256, distribution), draw(size=256))
    shifted = draw_slice(STREAM, "w", far + 5, far + 105, distribution)
    assert torch.equal(shifted, draw_slice(STREAM, "w", far, far + 256, distribution)[5:105])


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 300), length=st.integers(0, 300))
def test_a_slice_of_half_words_is_that_part_of_the_whole(start: int, length: int) -> None:
    whole = draw_half_words(STREAM, "w", 0, 600)
    assert torch.equal(draw_half_words(STREAM, "w", start, start + length), whole[start : start + length])


@EVERY_DISTRIBUTION
@settings(max_examples=60, deadline=None)
@given(
    # 1 is the shortest row; 128 is aligned for every distribution, 8 for the Gaussian alone.
    row_length=st.one_of(st.integers(1, 300), st.sampled_from([1, 2, 8, 9, 128, 129, 256])),
    rows=st.lists(st.integers(0, 8), min_size=1, max_size=6),
)
def test_rows_are_rows_of_the_whole(distribution: Elementwise, row_length: int, rows: list[int]) -> None:
    whole = draw(size=9 * row_length, distribution=distribution).view(9, row_length)
    chosen = draw_rows(STREAM, "w", torch.tensor(rows), row_length, distribution)
    assert torch.equal(chosen, whole[rows])


@EVERY_DISTRIBUTION
def test_rows_may_repeat_and_have_any_shape(distribution: Elementwise) -> None:
    rows = torch.tensor([[3, 3, 0], [1, 3, 2]])
    chosen = draw_rows(STREAM, "w", rows, 10, distribution)
    assert chosen.shape == (2, 3, 10)
    assert torch.equal(chosen, draw(size=40, distribution=distribution).view(4, 10)[rows])


@EVERY_DISTRIBUTION
@settings(max_examples=30, deadline=None)
@given(shapes=st.lists(st.lists(st.integers(1, 20), max_size=3), min_size=1, max_size=5), order=st.randoms())
def test_a_layout_draws_for_each_tensor_what_it_draws_alone(
    distribution: Elementwise, shapes: list[list[int]], order: random.Random
) -> None:
    """Neither the other tensors nor their order matter."""
    names = [f"tensor.{i}" for i in range(len(shapes))]
    named = {name: torch.Size(shape) for name, shape in zip(names, shapes, strict=True)}
    order.shuffle(names)
    layout = NoiseLayout({name: named[name] for name in names}, torch.device("cpu"))
    views = layout.views(layout.draw(STREAM, distribution))
    assert views.keys() == named.keys()
    for name, shape in named.items():
        alone = draw_slice(STREAM, name, 0, shape.numel(), distribution)
        assert torch.equal(views[name], alone.view(shape)), name


@EVERY_DISTRIBUTION
def test_a_layout_of_several_tiles_draws_the_same(distribution: Elementwise) -> None:
    size = TILE_BLOCKS * distribution.elements_per_block - 200
    layout = NoiseLayout({"a": torch.Size([size]), "b": torch.Size([700])}, torch.device("cpu"))
    flat = layout.draw(STREAM, distribution)
    for name, shape in layout.shapes.items():
        assert torch.equal(layout.view(flat, name), draw_slice(STREAM, name, 0, shape.numel(), distribution))


@EVERY_DISTRIBUTION
@pytest.mark.parametrize("tile", [4, 40, 1 << 21], ids="{} blocks at a time".format)
def test_few_kernels_for_many_streams_draw_the_same(
    distribution: Elementwise, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device with launches: several streams share a tile, or a stream takes several."""
    layout = NoiseLayout({"a": torch.Size([300]), "b": torch.Size([7, 50])}, torch.device("cpu"))
    streams = [Stream(3, 4, direction) for direction in range(5)]
    expected = torch.stack([layout.draw(stream, distribution) for stream in streams])
    sliced = draw_slice(STREAM, "w", 5, WHOLE, distribution)
    monkeypatch.setattr(draws, "is_launched", lambda device: True)
    monkeypatch.setattr(draws, "WIDE_TILE_BLOCKS", tile)
    assert torch.equal(layout.draw_all(streams, distribution), expected)
    assert torch.equal(draw_slice(STREAM, "w", 5, WHOLE, distribution), sliced)


@EVERY_DISTRIBUTION
def test_seed_step_direction_purpose_and_name_each_give_other_noise(distribution: Elementwise) -> None:
    """Same-shaped tensors with different names too; independent noise correlates by about 1/√n."""
    draws = [
        draw(stream, name, 8000, distribution)
        for stream, name in [
            (STREAM, "w"),
            (Stream(12, 5, 2), "w"),
            (Stream(11, 6, 2), "w"),
            (Stream(11, 5, 3), "w"),
            (Stream(11, 2, 5), "w"),
            (Stream(11, 5, 2, Purpose.BASIS), "w"),
            (Stream(11, 5, 2, Purpose.ROUNDING), "w"),
            (STREAM, "w2"),
        ]
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / 8000**0.5


@EVERY_DISTRIBUTION
def test_the_same_stream_gives_the_same_noise_again(distribution: Elementwise) -> None:
    first = draw(distribution=distribution)
    draw(Stream(99), distribution=distribution)
    assert torch.equal(first, draw(Stream(11, 5, 2), distribution=distribution))


def _layout_draw(distribution: Elementwise) -> Tensor:
    return NoiseLayout({"w": torch.Size([WHOLE])}, torch.device("cpu")).draw(STREAM, distribution)


@EVERY_DISTRIBUTION
@pytest.mark.parametrize(
    "way",
    [
        lambda distribution: draw(distribution=distribution),
        lambda distribution: draw_rows(STREAM, "w", torch.arange(9), 20, distribution),
        lambda distribution: draw_half_words(STREAM, "w", 0, 100),
        _layout_draw,
    ],
    ids=["slice", "rows", "half words", "layout"],
)
def test_no_global_generator_is_touched(distribution: Elementwise, way: Callable) -> None:
    """Neither read, so that reseeding changes nothing, nor advanced."""
    torch.manual_seed(0)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    first = way(distribution)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    assert random.getstate() == states[2]
    torch.manual_seed(1)
    assert torch.equal(first, way(distribution))


@EVERY_DISTRIBUTION
def test_the_number_of_threads_does_not_matter(distribution: Elementwise) -> None:
    before = torch.get_num_threads()
    draws = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            draws.append(draw(size=200_000, distribution=distribution))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*draws)


def test_the_stream_never_changes() -> None:
    """Pinned values: a trajectory written today must replay on later versions."""
    stream = Stream(42, 7, 1)
    assert stream.key == GOLDEN_KEY
    assert draw_half_words(stream, "model.layers.0.weight", 0, 10).tolist() == GOLDEN_HALF_WORDS
    signs = draw_slice(stream, "model.layers.0.weight", 0, 16, RADEMACHER)
    assert signs.tolist() == GOLDEN_SIGNS
    normals = draw_slice(stream, "model.layers.0.weight", 0, 4, GAUSSIAN)
    assert [round(z * 2**20) for z in normals.tolist()] == GOLDEN_NORMALS
    assert normals.tolist() == _quantiles(torch.device("cpu"))[GOLDEN_HALF_WORDS[:4]].tolist()


def test_bits_are_laid_out_as_documented() -> None:
    """Key and counter by hand, then the block's words in memory order: what another implementation would have to do."""

    def hash64(text: str) -> int:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    key, tensor = hash64("11/5/2/direction"), hash64("tensor/w")
    bits = b""
    for block in range(4):
        counter = (block, 0, tensor & 0xFFFFFFFF, tensor >> 32)
        words = philox_on_integers(counter, (key & 0xFFFFFFFF, key >> 32))
        bits += struct.pack("<4I", *words)
    half_words = struct.unpack("<32H", bits)
    assert draw_half_words(STREAM, "w", 0, 32).tolist() == list(half_words)
    assert draw(size=32).tolist() == _quantiles(torch.device("cpu"))[list(half_words)].tolist()
    signs = [1.0 - 2.0 * (byte >> bit & 1) for byte in bits for bit in range(8)]
    assert draw(size=512, distribution=RADEMACHER).tolist() == signs


# The distributions.

COUNT = 400_000


@EVERY_DISTRIBUTION
def test_moments_are_within_their_statistical_error(distribution: Elementwise) -> None:
    """Mean 0, variance 1, fourth moment 3 (Gaussian) or 1, and neighbors do not correlate."""
    z = draw(size=COUNT, distribution=distribution).double()
    fourth = {"gaussian": 3.0, "rademacher": 1.0}[distribution.name]
    error = COUNT**-0.5
    assert abs(z.mean()) < 4 * error
    assert abs(z.square().mean() - 1) < 4 * error * (fourth - 1) ** 0.5 + 1e-6
    assert abs(z.pow(3).mean()) < 4 * error * 15**0.5
    assert abs(z.pow(4).mean() - fourth) < 4 * error * 96**0.5
    for lag in (1, 2, 7, 8, 9, 64, 128, 256):
        assert abs((z[lag:] * z[:-lag]).mean()) < 4.5 * error, lag


@EVERY_DISTRIBUTION
def test_directions_do_not_correlate_between_steps(distribution: Elementwise) -> None:
    draws = torch.stack([draw(Stream(0, step), size=4096, distribution=distribution) for step in range(64)])
    gram = draws @ draws.t() / 4096 - torch.eye(64)
    off_diagonal = gram[~torch.eye(64, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 5 / 64
    assert abs(off_diagonal.square().mean() * 4096 - 1) < 0.15


def test_rademacher_is_plus_or_minus_one() -> None:
    z = draw(size=10_000, distribution=RADEMACHER)
    assert set(z.tolist()) == {-1.0, 1.0}


def test_the_gaussian_table_is_symmetric_and_of_unit_variance() -> None:
    table = _quantiles(torch.device("cpu"))
    assert table.shape == (2**16,)
    assert torch.equal(table, -table.flip(0))
    assert (table.diff() > 0).all()
    assert table.double().square().mean().item() == pytest.approx(1.0, abs=1e-7)


def test_the_gaussian_table_holds_the_quantiles_of_the_normal_law() -> None:
    """Scaling to unit variance moves them by less than 2e-5 of themselves."""
    table = _quantiles(torch.device("cpu"))
    for k in (0, 1, 100, 6553, 20000, 32767, 32768, 50000, 65000, 65535):
        assert table[k].item() == pytest.approx(NormalDist().inv_cdf((k + 0.5) / 2**16), rel=1e-4)


def test_gaussian_noise_fits_the_normal_law() -> None:
    """Kolmogorov-Smirnov: the largest distance between the distribution functions, at the 0.1 % level."""
    ordered = draw(size=100_000).double().sort().values
    expected = torch.special.ndtr(ordered)
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    distance = torch.maximum(steps - expected, expected - steps + 1 / len(ordered)).max()
    assert distance < 1.95 / len(ordered) ** 0.5


def test_half_words_are_uniform() -> None:
    """χ² over 256 bins of the high and of the low byte; its standard deviation is √(2·255)."""
    words = draw_half_words(STREAM, "w", 0, COUNT)
    assert words.min() >= 0 and words.max() < 2**16
    for byte in (words >> 8, words & 0xFF):
        counts = torch.bincount(byte, minlength=256).double()
        chi_square = ((counts - COUNT / 256) ** 2 / (COUNT / 256)).sum()
        assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


def test_every_bit_of_a_sign_block_is_fair() -> None:
    """Each of the 128 positions of a block, on its own."""
    z = draw(size=128 * 4000, distribution=RADEMACHER).view(4000, 128)
    assert (z.mean(0).abs() < 4.5 / 4000**0.5).all()
