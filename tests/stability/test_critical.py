"""Critical step sizes against an independent table, their bounds, scales, and what is refused."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stability.reference import CASES, SPECTRA
from zo_hf.stability import cocd_critical_step_size, critical_step_size, is_stable, moment_growth, step_size_bounds

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_directions": 7},
    {"momentum": 0.9},
    {"momentum": 0.3, "num_directions": 5},
    {"momentum": 0.9, "ema": True},
    {"direction": "sphere"},
    {"direction": "sphere", "momentum": 0.9, "num_directions": 2},
    {"direction": "rademacher"},
    {"direction": "rademacher", "momentum": 0.9},
    {"direction": "rademacher", "momentum": 0.2, "num_directions": 8},
]
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS, ids=str)


def random_spectrum(generator: np.random.Generator) -> np.ndarray:
    """Of 1 to 40 modes, flat to very steep, some of them zero."""
    size = int(generator.integers(1, 41))
    values = np.exp(generator.normal(0, generator.uniform(0, 6), size))
    values[1:][generator.random(size - 1) < 0.2] = 0
    return values


@pytest.mark.parametrize(("name", "options", "expected"), CASES, ids=str)
def test_the_table(name: str, options: dict[str, Any], expected: float) -> None:
    value = critical_step_size(SPECTRA[name], **options)
    assert value == pytest.approx(expected, abs=6e-7)
    assert is_stable(0.99 * value, SPECTRA[name], **options)
    assert not is_stable(1.01 * value, SPECTRA[name], **options)
    assert not is_stable(value, SPECTRA[name], **options)
    assert moment_growth(value, SPECTRA[name], **options) == pytest.approx(1, abs=1e-9)
    assert (
        moment_growth(0.99 * value, SPECTRA[name], **options)
        < 1
        < moment_growth(1.01 * value, SPECTRA[name], **options)
    )


@EVERY_OPTION
def test_bounds_hold_for_a_thousand_spectra(options: dict[str, Any]) -> None:
    generator = np.random.default_rng(0)
    spectra = [random_spectrum(generator) for _ in range(1000)]
    found = np.array([critical_step_size(values, **options) for values in spectra])
    for index, values in enumerate(spectra):
        sphere = {"dimension": len(values)} if options.get("direction") == "sphere" else {}
        lower, upper = step_size_bounds(values.sum(), values.max(), **options, **sphere)
        assert lower * (1 - 1e-13) <= found[index] <= upper * (1 + 1e-13)
        top = values[values > 0]
        if len(top) > 1 and top.min() < 0.9 * top.max() and options != {"direction": "rademacher"}:
            assert lower < found[index] < upper


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.just(0.0) | st.floats(1e-290, 1e12), min_size=1, max_size=30).filter(any),
    st.sampled_from([0.0, 0.1, 0.5, 0.99]),
    st.booleans(),
    st.sampled_from([1, 2, 100]),
    st.sampled_from(["gaussian", "sphere", "rademacher"]),
)
def test_bounds_and_the_crossing_hold_for_any_spectrum(
    values: list[float], momentum: float, ema: bool, num_directions: int, direction: str
) -> None:
    options: dict[str, Any] = {
        "momentum": momentum,
        "ema": ema,
        "num_directions": num_directions,
        "direction": direction,
    }
    value = critical_step_size(values, **options)
    dimension = len(values) if direction == "sphere" else None
    lower, upper = step_size_bounds(sum(values), max(values), **options, dimension=dimension)
    assert lower * (1 - 1e-12) <= value <= upper * (1 + 1e-12)
    assert moment_growth(value, values, **options) == pytest.approx(1, abs=1e-9)


def test_what_is_known_in_closed_form() -> None:
    sphere = np.array([3.0, 1.0, 0.5, 0.2, 0.0])
    assert critical_step_size(sphere, direction="sphere") == pytest.approx(
        critical_step_size(sphere) * 7 / 5, rel=1e-14
    )
    assert critical_step_size(sphere, direction="rademacher") == pytest.approx(2 / sphere.sum(), rel=1e-14)
    # One coordinate and a direction of length 1 is gradient descent with momentum.
    for direction in ("sphere", "rademacher"):
        assert critical_step_size([0.5], momentum=0.9, direction=direction) == pytest.approx(7.6, rel=1e-13)
    # So it is with very many directions.
    assert critical_step_size([4.0, 1.0], momentum=0.5, num_directions=10**9) == pytest.approx(2 * 1.5 / 4, rel=1e-6)
    plain = critical_step_size(sphere, momentum=0.7)
    assert critical_step_size(sphere, momentum=0.7, ema=True) == pytest.approx(plain / 0.3, rel=1e-14)


@EVERY_OPTION
def test_it_is_as_exact_at_any_scale(options: dict[str, Any]) -> None:
    values = np.array([1.0, 0.5, 0.5 * (1 + 1e-15), 1e-18])
    expected = critical_step_size(values, **options)
    for exponent in (-1000, -600, -3, 600, 1000):
        scale = 2.0**exponent
        assert critical_step_size(values * scale, **options) * scale == pytest.approx(expected, rel=1e-15)
        assert moment_growth(1.25 * expected / scale, values * scale, **options) == pytest.approx(
            moment_growth(1.25 * expected, values, **options), rel=1e-13
        )


@EVERY_OPTION
def test_a_million_eigenvalues_take_less_than_a_second(options: dict[str, Any]) -> None:
    values = np.random.default_rng(1).lognormal(0, 3, 10**6)
    start = time.process_time()
    value = critical_step_size(values, **options)
    assert time.process_time() - start < 1
    sphere = {"dimension": 10**6} if options.get("direction") == "sphere" else {}
    lower, upper = step_size_bounds(values.sum(), values.max(), **options, **sphere)
    assert lower * (1 - 1e-12) <= value <= upper * (1 + 1e-12) < 1.4 * lower


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_lists_arrays_and_tensors_are_alike(dtype: torch.dtype) -> None:
    expected = critical_step_size([4, 2, 1, 0], preconditioner=[1, 2, 4, 8])
    tensor = torch.tensor([4, 2, 1, 0]).to(dtype).requires_grad_(dtype.is_floating_point)
    assert critical_step_size(tensor, preconditioner=torch.tensor([1, 2, 4, 8]).to(dtype)) == expected
    assert critical_step_size(np.array([4, 2, 1, 0]), preconditioner=(1, 2, 4, 8)) == expected
    assert critical_step_size([4, 1, 0.25, 0]) == expected


def test_edges() -> None:
    assert critical_step_size([0.0, 0.0]) == math.inf
    assert is_stable(1e300, [0.0])
    assert is_stable(0.0, [1.0]) and not is_stable(math.inf, [1.0])
    mixed = [2.0, -1e-9, 0.5, -3.0]
    assert critical_step_size(mixed, negative="ignore") == critical_step_size([2.0, 0.5])
    assert critical_step_size(mixed, negative="ignore", direction="sphere") == critical_step_size(
        [2.0, 0.5, 0.0, 0.0], direction="sphere"
    )
    assert critical_step_size([-1.0], negative="ignore") == math.inf


def test_bounds_of_arrays() -> None:
    lower, upper = step_size_bounds(np.array([[4.0], [8.0]]), torch.tensor([1.0, 2.0, 3.0]))
    assert lower.shape == (2, 3) and upper.dtype == np.float64
    assert lower[1, 2] == step_size_bounds(8.0, 3.0)[0] == 2 / 14
    assert (np.broadcast_to(upper, (2, 3))[0] == 0.5).all()
    assert all(type(bound) is float for bound in step_size_bounds(torch.tensor(4.0), 1))
    assert step_size_bounds(0.0, 0.0) == (math.inf, math.inf)
    assert step_size_bounds(-1.0, 2.0) == (2 / 3, math.inf)


@pytest.mark.parametrize(("momentum", "ema"), [(0.0, False), (0.8, False), (0.8, True)])
def test_bounds_are_the_published_ones(momentum: float, ema: bool) -> None:
    lower, upper = step_size_bounds(10.0, 3.0, momentum=momentum, ema=ema)
    unit = 1.0 if ema else 1 - momentum
    assert upper == pytest.approx(2 * unit / 10)
    assert lower == pytest.approx(2 * unit / (10 + 2 * 3 / (1 + momentum)))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1 - 1e-12, 1.0])
@pytest.mark.parametrize("num_blocks", [1, 2, 1000])
def test_cocd(decay: float, num_blocks: int) -> None:
    applied = sum(decay**k for k in range(num_blocks))
    assert cocd_critical_step_size(4.0, num_blocks, decay) == pytest.approx(0.5 / applied, rel=1e-12)
    assert cocd_critical_step_size(0.0, num_blocks, decay) == math.inf


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("eigenvalues contains -1.*negative='ignore'", {"eigenvalues": [1.0, -1.0]}),
    ("eigenvalues must be a vector", {"eigenvalues": []}),
    ("eigenvalues must be a vector", {"eigenvalues": np.eye(2)}),
    ("eigenvalues must be finite", {"eigenvalues": [1.0, math.nan]}),
    ("eigenvalues must be finite", {"eigenvalues": [math.inf]}),
    ("eigenvalues must be real", {"eigenvalues": [1j]}),
    ("eigenvalues must be real", {"eigenvalues": torch.tensor([1j])}),
    ("eigenvalues / preconditioner must be finite", {"eigenvalues": [1e300], "preconditioner": [1e-300]}),
    ("preconditioner has 1 entries for 2", {"eigenvalues": [1.0, 2.0], "preconditioner": [1.0]}),
    ("preconditioner must be positive", {"preconditioner": [0.0]}),
    ("negative='drop' must", {"negative": "drop"}),
    ("momentum=1.0 must", {"momentum": 1.0}),
    ("momentum=-0.5 must", {"momentum": -0.5}),
    ("momentum=nan must", {"momentum": math.nan}),
    ("num_directions=0 must", {"num_directions": 0}),
    ("direction='uniform' is", {"direction": "uniform"}),
]


@pytest.mark.parametrize(("about", "arguments"), WRONG, ids=[about for about, _ in WRONG])
def test_one_sentence_says_what_is_wrong(about: str, arguments: dict[str, Any]) -> None:
    arguments = {"eigenvalues": [1.0]} | arguments
    for function in (critical_step_size, lambda **all: moment_growth(0.1, **all), lambda **all: is_stable(0.1, **all)):
        with pytest.raises(ValueError, match=about) as error:
            function(**arguments)
        assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_other_refusals() -> None:
    for about, call in {
        "step_size=-1": lambda: is_stable(-1, [1.0]),
        "step_size=nan": lambda: is_stable(math.nan, [1.0]),
        "dimension, the number": lambda: step_size_bounds(1, 1, direction="sphere"),
        "dimension=0": lambda: step_size_bounds(1, 1, direction="sphere", dimension=0),
        "lambda_max=-1": lambda: cocd_critical_step_size(-1, 1, 1.0),
        "num_blocks=0": lambda: cocd_critical_step_size(1, 0, 1.0),
        "decay=1.5": lambda: cocd_critical_step_size(1, 1, 1.5),
    }.items():
        with pytest.raises(ValueError, match=about):
            call()
