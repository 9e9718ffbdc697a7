"""The prediction on quadratics that real steps are taken on, its limits, and that what it leaves open is honest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lr_finder.noisy_bowl import DIMENSION, Bowl, after_training, square
from zo_hf.lr_finder.loss_probes import LineProbe, LossProbes
from zo_hf.lr_finder.predicted_loss import DIVERGED, Posterior, candidate_rates, posterior_of, predicted_losses


def known(gradient: float, noise: float, *curvatures: float, groups: int = 1) -> Posterior:
    values = (gradient, noise, curvatures[0], curvatures[-1], 1.0)
    return Posterior(*(np.array([float(value)]) for value in values), groups=groups)


def constant(*multiples: float) -> list[tuple[float, float]]:
    """A schedule that does not change within its pieces."""
    return [(multiple, multiple**2) for multiple in multiples]


@pytest.mark.parametrize(
    ("multiples", "part", "noise", "options", "groups"),
    [
        ((1.0,), 0.1, 8.0, {}, 1),
        ((1.0,), 1.2, 2.0, {}, 1),
        ((1.0, 0.6, 0.2), 0.5, 4.0, {}, 1),
        ((1.0, 0.6, 0.2), 0.2, 4.0, {"rule": "sign"}, 1),
        ((1.0,), 0.3, 0.0, {}, 4),
        ((1.0, 0.4), 0.3, 1.0, {"num_directions": 2, "direction": "rademacher"}, 2),
        ((1.0,), 0.15, 2.0, {"rule": "sign"}, 4),
        ((1.0,), 0.15, 2.0, {"normalize": True}, 4),
        *(pytest.param((1.0,), 0.2, 0.0, {"rule": rule}, 1, marks=pytest.mark.slow) for rule in ("none", "sign")),
    ],
)
def test_it_is_what_runs_end_with_on_a_quadratic(
    multiples: tuple[float, ...], part: float, noise: float, options: dict[str, Any], groups: int
) -> None:
    """With equal eigenvalues h the gradient's square is 2·h·L, and the prediction exact."""
    curvature, steps, seeds = 2.0, 60 if groups == 1 else 32, 20 if groups == 1 else 10
    q, fixed_length = options.get("num_directions", 1), options.get("rule", "none") != "none" or "normalize" in options
    kappa, kappa_v = (curvature * (DIMENSION + count + 1) / count for count in (q * groups, q))
    rate, unit = part / kappa, 1.0
    first = curvature / 2 * square(Bowl(curvature))
    variance = noise**2 * DIMENSION
    if fixed_length:
        unit = math.sqrt(2 * curvature * first + variance)
        # Signs of the groups add up, while their normalized numbers have one group's length together.
        unit /= math.sqrt(groups) if options.get("rule") == "sign" else 1.0
    rates = [rate * unit * multiple for multiple in multiples for _ in range(steps // len(multiples))]
    more = options | ({"rows_per_direction": 1, "noise_scale_steps": 0} if groups > 1 else {})
    rows = groups if groups > 1 else 0
    runs = [after_training(rates, curvature, noise, seed, rows, **more) / first for seed in range(seeds)]
    what = known(2 * curvature, variance / first, kappa, kappa_v, groups=groups)
    (expected,) = predicted_losses(what, np.array([rate]), steps, constant(*multiples), fixed_length)[0]
    error = np.std(runs, ddof=1) / math.sqrt(len(runs))
    # Steps are finite, the differential equation's are not; and the mean of |c| is √(2/π) of its root mean square.
    slack = 0.35 if options.get("rule") == "sign" else 0.1
    assert np.mean(runs) == pytest.approx(expected, abs=4 * error, rel=slack)


def test_a_run_that_keeps_the_length_of_its_steps_ends_at_a_floor() -> None:
    """Where descent, η·g·√ℓ, is as large as what the curvature adds: √ℓ = ½ηκ·g, of units with L₀ = 1."""
    gradient, curvature, rate = 2.0, 30.0, 0.01
    what = known(gradient, 0.0, curvature)
    (end,) = predicted_losses(what, np.array([rate]), 10**5, fixed_length=True)[0]
    assert end == pytest.approx((rate * curvature / 2) ** 2, rel=1e-3)
    assert predicted_losses(what, np.array([rate]), 10**5)[0, 0] < 1e-100


def least(what: Posterior, steps: float) -> float:
    rates = candidate_rates(what)
    return float(rates[predicted_losses(what, rates, steps)[:, 0].argmin()])


def test_the_best_rate_in_the_limits() -> None:
    assert least(known(0.1, 0.0, 20.0), 300) == pytest.approx(1 / 20, rel=0.06)
    assert least(known(1e-4, 3e-4, 20.0), 300) == pytest.approx(0.25 / 20, rel=0.06)
    # In a long run, where the floor matters: e^-x = ½κv/g⁴·L₀/T, with x = η·g²·T/L₀.
    gradient, noise, curvature, steps = 2.0, 6.0, 20.0, 5000.0
    exponent = -math.log(curvature * noise / (2 * gradient**2 * steps))
    assert least(known(gradient, noise, curvature), steps) == pytest.approx(exponent / gradient / steps, rel=0.1)


def test_a_constant_schedule_in_pieces_is_the_same() -> None:
    what = Posterior(*np.random.default_rng(0).uniform(0.1, 2.0, (5, 50)))
    rates = np.geomspace(1e-3, 10.0, 30)
    whole = predicted_losses(what, rates, 320)
    assert np.allclose(whole, predicted_losses(what, rates, 320, constant(*[1.0] * 32)), rtol=1e-9)
    assert whole.max() == DIVERGED and np.isfinite(whole).all()


@pytest.mark.parametrize("steps", [10**3, 10**5, 10**7])
def test_what_is_lost_does_not_come_back(steps: int) -> None:
    """A third of the run is unstable, and what follows would bring any number down to nothing."""
    linear = constant(*np.linspace(1.0, 0.0, 32))
    what = Posterior(*np.array([[2.0, 2.0], [0.0, 0.3], [1.0, 1.0], [1.0, 1.0], [0.5, 0.5]]))
    assert (predicted_losses(what, np.array([3.0]), steps, linear) == DIVERGED).all()
    losses = predicted_losses(what, candidate_rates(what, linear), steps, linear)
    assert np.isfinite(losses).all() and losses.min() < 0.1


def test_rates_reach_as_far_as_a_schedule_that_stays_small_allows() -> None:
    what, low = known(1e-4, 1e-6, 20.0), constant(0.1)
    assert candidate_rates(what, low) == pytest.approx(10 * candidate_rates(what))
    assert np.allclose(
        predicted_losses(what, candidate_rates(what, low), 300, low),
        predicted_losses(what, candidate_rates(what), 300),
    )


def drawn(correlation: float, pairs: int, generator: np.random.Generator, groups: int = 1) -> LossProbes:
    """Probes of a loss of which ϱ is known; E[c²] = 9. Groups of rows give v, and then far slopes are of no use."""
    common, own = math.sqrt(correlation), math.sqrt(1 - correlation)
    lines = []
    for _ in range(pairs):
        shared, near, far = 3 * generator.standard_normal(3)
        noise = None
        if groups > 1:
            each = 3 * math.sqrt(groups) * generator.standard_normal(groups)
            near, far, noise = each.mean(), 10 * far, float(own**2 * each.var(ddof=1) / groups)
        lines.append(LineProbe(common * shared + own * near, 0.1, 2.0, 0.4, common * shared + own * far, noise))
    return LossProbes(tuple(lines))


@pytest.mark.parametrize(("pairs", "groups"), [(4, 1), (12, 1), (4, 4), (12, 16)])
def test_what_is_left_open_is_honest(pairs: int, groups: int) -> None:
    """The true ϱ, drawn as it is thought to be beforehand, is in the middle nine tenths nine times in ten."""
    generator, inside = np.random.default_rng(pairs), 0
    for _ in range(300):
        true = generator.uniform()
        what = posterior_of(drawn(true, pairs, generator, groups), 1, groups)
        below = what.weight[what.gradient / (what.gradient + what.noise) < true].sum()
        inside += 0.05 < below < 0.95
    assert 0.85 <= inside / 300 <= 0.95


def test_the_curvature_is_left_open_too() -> None:
    generator, inside = np.random.default_rng(2), 0
    for _ in range(200):
        true = 40.0
        rises = generator.normal(true, 0.5 * true, 6) * 0.1**2 / 2
        probes = LossProbes(tuple(LineProbe(3.0, 0.1, 2.0, rise, -2.0) for rise in rises))
        what = posterior_of(probes, 1)
        kappa = true + 2 * probes.largest_curvature
        inside += 0.05 < what.weight[what.curvature < kappa].sum() < 0.95
    assert inside / 200 > 0.95  # more than nine tenths, as the curvature is to drift


def test_slopes_beyond_what_the_loss_allows_are_noise() -> None:
    """‖g‖² ≤ 2κL₀ = 2·40·2: of E[c²] = 10⁶ nearly nothing is the gradient's."""
    generator = np.random.default_rng(3)
    lines = [LineProbe(a, 0.1, 2.0, 0.2, b) for a, b in 1000 * generator.standard_normal((6, 2))]
    what = posterior_of(LossProbes(tuple(lines)), 1)
    assert not what.inconsistent and (what.gradient <= 2 * what.curvature).all()
    assert what.weight @ (what.gradient / what.noise) < 1e-3
    for size in (1e3, 1e9):
        assert posterior_of(LossProbes(tuple(LineProbe(size, 0.1, 2.0, 0.2, size) for _ in range(6))), 1).inconsistent


def test_more_directions_leave_less_open() -> None:
    generator = np.random.default_rng(1)

    def spread(pairs: int) -> float:
        what = posterior_of(drawn(0.5, pairs, generator), 1)
        correlation = what.gradient / (what.gradient + what.noise)
        return math.sqrt(what.weight @ (correlation - what.weight @ correlation) ** 2)

    assert np.mean([spread(40) for _ in range(10)]) < 0.6 * np.mean([spread(4) for _ in range(10)])


@pytest.mark.parametrize("fixed_length", [False, True])
def test_groups_allow_larger_rates_where_directions_are_the_noise(fixed_length: bool) -> None:
    """In a short run by the factor of the curvatures without noise of batches, and not at all if that is all there is."""

    def best(correlation: float, groups: int) -> float:
        what = posterior_of(drawn(correlation, 400, np.random.default_rng(0), 16), 1, groups)
        rates = candidate_rates(what)
        return float(rates[(predicted_losses(what, rates, 0.1, fixed_length=fixed_length) @ what.weight).argmin()])

    # The probes of `drawn` all rise alike, so λmax is 0. Steps of a fixed length are √G times as long for their rate.
    factor = 16 / (4 if fixed_length else 1)
    assert best(1.0, 16) / best(1.0, 1) == pytest.approx(factor, rel=0.15)
    assert best(0.0, 16) / best(0.0, 1) == pytest.approx(1.0, rel=0.25)
    rates = [best(0.8, groups) for groups in (1, 2, 4, 8)]
    assert rates == sorted(rates)


def test_what_is_thought_of_a_loss_does_not_depend_on_groups() -> None:
    one, many = (posterior_of(drawn(0.5, 6, np.random.default_rng(4)), 2, groups) for groups in (1, 32))
    for name in ("gradient", "noise", "noise_curvature", "weight"):
        assert (getattr(one, name) == getattr(many, name)).all()
    assert (one.curvature == one.noise_curvature).all() and (many.curvature < one.curvature).all()


@settings(deadline=None, max_examples=10)
@given(scale=st.floats(1e-3, 1e3), stretch=st.floats(1e-3, 1e3), seed=st.integers(0, 10**6))
def test_units_do_not_matter(scale: float, stretch: float, seed: int) -> None:
    """A loss times a, of coordinates times b: the rate times b²/a."""
    probes = drawn(0.5, 5, np.random.default_rng(seed))
    other = LossProbes(
        tuple(
            LineProbe(
                line.near * scale / stretch,
                line.distance * stretch,
                line.loss * scale,
                line.rise * scale,
                line.far * scale / stretch,
            )
            for line in probes.lines
        )
    )
    best = []
    for each in (probes, other):
        what = posterior_of(each, 2)
        rates = candidate_rates(what)
        best.append(rates[(predicted_losses(what, rates, 200) @ what.weight).argmin()])
    assert best[1] == pytest.approx(best[0] * stretch**2 / scale, rel=0.07)


def bent(shrink: float) -> LossProbes:
    """Probes whose far slopes are a fraction `shrink` of the near ones, in alternating signs."""
    near = (5.0, -6.0, 4.0, 7.0, -5.0, 6.0, -4.0, 5.0)
    return LossProbes(tuple(LineProbe(c, 0.1, 4.0, 0.8, c * shrink * (-1) ** i) for i, c in enumerate(near)))


def test_slopes_that_shrink_far_away_make_the_curvature_less_certain() -> None:
    assert bent(1.0).bend == bent(0.8).bend == bent(3.0).bend == 0.0
    assert bent(0.1).bend == pytest.approx(math.log(10), rel=0.05)

    def spread(shrink: float) -> float:
        posterior = posterior_of(bent(shrink), 1)
        return float(posterior.curvature.max() / posterior.curvature.min())

    assert spread(0.8) == spread(1.0) < spread(0.1)
