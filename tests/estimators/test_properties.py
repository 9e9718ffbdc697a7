"""What must hold of each estimator beyond its formula: bias, variance, invariances, and that it descends."""

from __future__ import annotations

import pytest
import torch

from tests.estimators.quadratic import (
    ALONG_NOISE,
    DIMENSION,
    EVERY_DIRECTION,
    EVERY_ESTIMATOR,
    Quadratic,
    directions,
    drawn,
    engine,
    every_number,
    numbers,
)
from zo_hf.directions import ELEMENTWISE
from zo_hf.engine import ZerothOrder
from zo_hf.parallel.ranks import Grid, Ranks
from zo_hf.subspaces import LowRank

SLOPES = [name for name, kind in ALONG_NOISE.items() if not kind.is_scale_free]
SCALE_FREE = [name for name, kind in ALONG_NOISE.items() if kind.is_scale_free]


@EVERY_ESTIMATOR
@EVERY_DIRECTION
def test_the_mean_estimate_points_along_the_gradient(estimator: str, direction: str) -> None:
    """E[c·z] is ∇L of a quadratic, or a multiple of it, by Student's statistic of every coordinate."""
    model, count = Quadratic(), 4000
    z = drawn(direction, count, DIMENSION)
    samples = numbers(ALONG_NOISE[estimator](1e-3, count), model, z)[:, None] * z
    mean, gradient = samples.mean(0), model.gradient()
    scale = (mean @ gradient / gradient.square().sum()) if ALONG_NOISE[estimator].is_scale_free else 1.0
    assert float(scale) > 0
    student = (mean - scale * gradient) / (samples.std(0) / count**0.5)
    assert student.abs().max() < 4.5


@pytest.mark.parametrize("estimator", SLOPES)
@pytest.mark.parametrize(("direction", "q"), [("gaussian", 1), ("gaussian", 4), ("rademacher", 4)])
def test_the_variance_falls_as_one_over_the_directions(estimator: str, direction: str, q: int) -> None:
    """Of a linear loss: Var(ĝⱼ) = (|g|² + gⱼ²·(E[z⁴] - 2)) / q."""
    model, kind = Quadratic(curvature=0.0), ALONG_NOISE[estimator](1e-3, q)
    gradients = [
        torch.tensor(kind.coefficients(every_number(kind, model, z)), dtype=torch.float64) @ z
        for z in drawn(direction, 2000, q, DIMENSION)
    ]
    g = model.gradient()
    fourth = 3.0 if direction == "gaussian" else 1.0
    expected = (g.square().sum() + g.square() * (fourth - 2)) / q
    assert torch.stack(gradients).var(0).mean().item() == pytest.approx(expected.mean().item(), rel=0.08)
    assert torch.stack(gradients).var(0).numpy() == pytest.approx(expected.numpy(), rel=0.25)


@EVERY_DIRECTION
@pytest.mark.parametrize("eps", [1e-2, 0.5])
def test_the_bias_of_a_forward_difference_is_the_curvature_along_it(direction: str, eps: float) -> None:
    model = Quadratic()
    zo = engine(model, "one_sided", 6, eps=eps, direction=direction)
    z = directions(6, distribution=ELEMENTWISE[direction])
    expected = z @ model.gradient() + eps / 2 * torch.einsum("qi,ij,qj->q", z, model.hessian, z)
    assert zo.estimate(model).projected_gradients == pytest.approx(expected.tolist(), rel=1e-9)


@pytest.mark.parametrize("eps", [1e-3, 100.0])
def test_the_forward_gradient_is_exact_whatever_eps_is(eps: float) -> None:
    model = Quadratic()
    zo = engine(model, "forward_gradient", 6, eps=eps)
    expected = directions(6) @ model.gradient()
    assert zo.estimate(model).projected_gradients == pytest.approx(expected.tolist(), rel=1e-12)


@pytest.mark.parametrize("estimator", SCALE_FREE)
@pytest.mark.parametrize(("factor", "shift"), [(2.0**10, 0.0), (1e-3, 0.0), (0.37, 1.0), (5.0, -40.0)])
def test_the_scale_of_the_loss_does_not_matter(estimator: str, factor: float, shift: float) -> None:
    model = Quadratic()
    plain = engine(model, estimator, 4).estimate(model)
    changed = engine(model, estimator, 4).estimate(lambda: model() * factor + shift)
    assert changed.projected_gradients == pytest.approx(plain.projected_gradients, rel=1e-7)
    assert max(map(abs, plain.projected_gradients)) > 0.1


def test_ranks_see_nothing_but_the_order_of_the_losses() -> None:
    model = Quadratic()
    plain = engine(model, "evolution_ranks", 4).estimate(model).projected_gradients
    for increasing in (torch.exp, torch.atan, lambda loss: loss**3):
        assert (
            engine(model, "evolution_ranks", 4).estimate(lambda f=increasing: f(model())).projected_gradients == plain
        )
    assert engine(model, "evolution", 4).estimate(lambda: model().exp()).projected_gradients != plain


def test_equal_losses_share_their_rank() -> None:
    ranks = ALONG_NOISE["evolution_ranks"](1e-3, 3)
    assert ranks.scores([5.0, 1.0, 1.0, 7.0, 5.0, 5.0]) == pytest.approx([0.1, -0.4, -0.4, 0.5, 0.1, 0.1])
    # Which of two equal losses came first says nothing.
    assert ranks.projected_gradients([1.0, 1.0, 2.0, 2.0, 0.0, 3.0])[:2] == [0.0, 0.0]


@pytest.mark.parametrize("estimator", SCALE_FREE)
@pytest.mark.parametrize("value", [0.0, 0.1, 1e300, -7.0])
@pytest.mark.parametrize("q", [2, 3, 7])
def test_equal_losses_give_no_step_and_no_nan(estimator: str, value: float, q: int) -> None:
    """Also where their mean is rounded to another number than they are."""
    kind = ALONG_NOISE[estimator](1e-3, q)
    assert kind.projected_gradients([value] * len(kind.probes())) == [0.0] * q


@pytest.mark.parametrize("q", range(2, 12))
def test_fzoo_of_equal_losses_apart_from_the_clean_one_is_no_step(q: int) -> None:
    """Their standard deviation is 0, though 0.1 is not what its rounded mean is, and c would be of the order 1e19."""
    assert ALONG_NOISE["fzoo"](1e-3, q).projected_gradients([1.0, *[0.1] * q]) == [0.0] * q


def test_fzoo_is_the_step_of_normalized_descent() -> None:
    """σ / ε is |∇L| of a linear loss, in the mean of squares: so c·z is ∇L / (ε·|∇L|)."""
    model, count, eps = Quadratic(curvature=0.0), 20_000, 1e-3
    z = drawn("gaussian", count, DIMENSION)
    mean = (numbers(ALONG_NOISE["fzoo"](eps, count), model, z)[:, None] * z).mean(0)
    gradient = model.gradient()
    torch.testing.assert_close(mean * eps, gradient / gradient.norm(), rtol=0, atol=5 * (2 / count) ** 0.5)


@EVERY_ESTIMATOR
def test_numbers_are_made_of_the_losses_of_all_micro_batches_and_ranks(estimator: str) -> None:
    """Not averages of what each would make of its own losses: that differs wherever they are divided by a deviation."""

    class TwoRanks(Ranks):
        """The other rank has the other half of the data."""

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            is_losses = tensor.shape == others.shape  # else a choice that both make alike
            return torch.stack([tensor, others if is_losses else tensor])

    model = Quadratic()

    whole = engine(Quadratic(), estimator, 3)
    expected = whole.estimate(whole.model)
    zo = engine(model, estimator, 3)
    for sign in (1.0, -1.0):
        model.ripple = 30 * sign
        zo.probe(model, weight=0.5)
    parts = zo.finish_estimate()
    assert parts.projected_gradients == pytest.approx(expected.projected_gradients, rel=1e-6)
    assert parts.loss == pytest.approx(expected.loss, rel=1e-12)

    others = zo.probe(model)
    zo.finish()
    zo = engine(model, estimator, 3, ranks=TwoRanks(Grid(data=2)))
    model.ripple = 30.0
    own = zo.probe(model)
    assert zo.finish_estimate().projected_gradients == pytest.approx(expected.projected_gradients, rel=1e-6)
    assert zo.estimator.projected_gradients(own.tolist()) != pytest.approx(expected.projected_gradients, rel=0.1)


@EVERY_ESTIMATOR
def test_a_quadratic_is_descended(estimator: str) -> None:
    """To its minimum, with steps that shrink to nothing: what is scale-free steps as far near the minimum as away from it."""
    model = Quadratic(slope=0.0)
    zo = engine(model, estimator, 4)
    kind = ALONG_NOISE[estimator]
    size = {"fzoo": 0.3 * zo.estimator.eps, "evolution": 0.3, "evolution_ranks": 0.9}.get(estimator, 0.1)
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=size))
    before, steps = model().item() - 3, 100
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = size * (0.92**step if kind.is_scale_free else 1.0)
        zo.estimate(model)
        optimizer.step()
    zo.finish()
    assert model().item() - 3 < 1e-4 * before
    assert (model.x.detach() - model.minimum).abs().max() < 0.05


def test_the_default_learning_rate_of_fzoo_takes_its_scale_into_account() -> None:
    for name, kind in ALONG_NOISE.items():
        factor = 1e-2 if name == "fzoo" else 1.0
        assert kind(1e-2, 2).learning_rate(1e-5) == pytest.approx(1e-5 * factor)


def test_a_subspaces_clip_is_for_slopes() -> None:
    """|c| of FZOO is about 1/ε, where QZO's clip of 100 would leave nothing but signs."""
    for name in ALONG_NOISE:
        model = Quadratic()
        space = LowRank(model, 1, 0)
        space.default_max_projected_grad = 100.0
        zo = ZerothOrder(model, space, estimator=name, num_directions=2)
        assert zo.max_projected_grad == (0.0 if name in ("fzoo", "evolution", "evolution_ranks") else 100.0)
