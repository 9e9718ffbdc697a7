"""The account against closed forms, an integral, and the library's own accountant."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from zo_hf.privacy import Guarantee, accounting
from zo_hf.privacy.accounting import check_installed, default_delta

pytest.importorskip("dp_accounting")


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """ε of one Gaussian mechanism (Balle and Wang, arXiv 1805.06530, Theorem 8)."""

    def excess(epsilon: float) -> float:
        a, b = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
        return float(stats.norm.cdf(a - b) - math.exp(epsilon) * stats.norm.cdf(-a - b)) - delta

    return float(optimize.brentq(excess, 0, 200))


@pytest.mark.parametrize(("noise", "steps"), [(4.0, 1), (8.0, 16), (20.0, 100)])
def test_without_sampling_it_is_one_gaussian_mechanism_with_less_noise(noise: float, steps: int) -> None:
    found = Guarantee(noise, 100, 100, 1e-5).epsilon(steps)
    assert found == pytest.approx(gaussian_epsilon(noise / math.sqrt(steps), 1e-5), rel=2e-3)


def test_one_sampled_step_has_the_delta_of_the_integral() -> None:
    """δ(ε) = ∫ max(0, p − e^ε·q), of a mixture against a normal density, the worse of adding and removing a row."""
    noise, rate = 1.2, 0.3
    guarantee = Guarantee(noise, 10, 3, 1e-3)
    epsilon = guarantee.epsilon(1)

    def delta(added: bool) -> float:
        def excess(x: float) -> float:
            plain = stats.norm.pdf(x, 0, noise)
            mixed = (1 - rate) * plain + rate * stats.norm.pdf(x, 1, noise)
            p, q = (plain, mixed) if added else (mixed, plain)
            return max(0.0, p - math.exp(epsilon) * q)

        return integrate.quad(excess, -15, 15, limit=400, points=np.linspace(-6, 8, 30))[0]

    assert max(delta(True), delta(False)) == pytest.approx(1e-3, rel=5e-3)


def test_it_is_the_librarys_own_account() -> None:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(16 / 1000, dp_accounting.GaussianDpEvent(2.0)), 200)
    assert Guarantee(2.0, 1000, 16, 1e-4).epsilon(200) == pytest.approx(accountant.get_epsilon(1e-4), rel=1e-6)


def test_epsilon_grows_with_steps_and_falls_with_noise() -> None:
    by_steps = [Guarantee(2.0, 1000, 16, 1e-4).epsilon(steps) for steps in (0, 1, 10, 100)]
    assert by_steps[0] == 0 and by_steps == sorted(by_steps) and len(set(by_steps)) == 4
    assert Guarantee(4.0, 1000, 16, 1e-4).epsilon(100) < by_steps[-1]
    assert Guarantee(0.0, 1000, 16, 1e-4).epsilon(1) == math.inf


def test_the_steps_within_a_target_are_the_most() -> None:
    guarantee = Guarantee(4.0, 1000, 100, 1e-4)
    steps = guarantee.steps_within(0.5, 10**6)
    assert guarantee.epsilon(steps) <= 0.5 < guarantee.epsilon(steps + 1)
    assert guarantee.steps_within(0.5, 3) == min(steps, 3)
    assert guarantee.steps_within(1e-6, 10**6) == 0


@pytest.mark.parametrize(("rows", "delta"), [(1, 0.1), (9, 0.1), (10, 0.01), (999, 1e-3), (1000, 1e-4), (8530, 1e-4)])
def test_delta_is_the_largest_power_of_ten_below_one_over_n(rows: int, delta: float) -> None:
    assert default_delta(rows) == pytest.approx(delta) and delta < 1 / rows <= 10 * delta * (1 + 1e-9)


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs dp-accounting, .* pip install 'zo_hf\[private\]'\.$"):
        check_installed()
