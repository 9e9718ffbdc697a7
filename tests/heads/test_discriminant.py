"""Linear discriminant analysis beside the Gaussian posteriors that it stands for, and scikit-learn's shrinkage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn.functional import cross_entropy

from zo_hf.heads import discriminant
from zo_hf.heads.discriminant import FOLDS, fit_discriminant, shrunk_covariance


def gaussians(rows: int, size: int, classes: int, seed: int = 0, distance: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features, (rows, size), of classes with means of their own and a common covariance, and the labels, (rows,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    mixed = torch.randn(size, size, generator=generator, dtype=torch.float64)
    means = 3 + distance * torch.randn(classes, size, generator=generator, dtype=torch.float64)
    return torch.randn(rows, size, generator=generator, dtype=torch.float64) @ mixed + means[labels], labels


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 60), size=st.integers(1, 30), seed=st.integers(0, 10**6))
def test_the_covariance_is_shrunk_as_scikit_learn_does(rows: int, size: int, seed: int) -> None:
    centered = gaussians(rows, size, 1, seed)[0]
    expected, _ = ledoit_wolf(centered.numpy(), assume_centered=True)
    torch.testing.assert_close(shrunk_covariance(centered), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_a_covariance_of_rank_one_has_the_shortest_solution() -> None:
    """Rows that are ± one vector leave nothing to shrink, as Ledoit and Wolf count."""
    axis = torch.linspace(-1, 1, 300, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0] * 6, dtype=torch.float64)
    covariance = shrunk_covariance(signs[:, None] * axis)
    solved = discriminant._solved(covariance, axis[:, None])[:, 0]
    torch.testing.assert_close(solved, axis / axis.square().sum(), rtol=1e-6, atol=1e-9)


def test_features_that_never_vary_leave_the_covariance_invertible() -> None:
    assert torch.linalg.matrix_rank(shrunk_covariance(torch.zeros(5, 3, dtype=torch.float64))) == 3


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_logits_are_those_of_gaussians_with_one_covariance(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discriminant, "_best_factor", lambda *_: 1.0)
    features, labels = gaussians(90, 4, classes)
    labels[:20] = 0  # the classes are not equally frequent
    found, _ = fit_discriminant(features, labels, classes, True)
    means = torch.stack([features[labels == index].mean(0) for index in range(classes)])
    covariance = shrunk_covariance(features - means[labels])
    density = torch.stack([MultivariateNormal(mean, covariance).log_prob(features) for mean in means], 1)
    frequency = torch.bincount(labels) / len(labels)
    torch.testing.assert_close(
        found.logits(features).softmax(1), (density + frequency.double().log()).softmax(1), rtol=1e-6, atol=1e-9
    )


def test_predictions_of_the_cross_validation_do_not_know_their_row() -> None:
    labels = torch.arange(40) % 2
    # As many features as to tell every row apart: a head that has seen the rows knows all labels, which are random here.
    many = torch.randn(40, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, scores = fit_discriminant(many, labels, 2, True)
    unscaled = discriminant._unscaled(many, labels, 2)
    assert (unscaled.logits(many).argmax(1) == labels).all(), "all of its own rows"
    assert (scores.argmax(1) == labels).double().mean() < 0.75, "others by chance"
    assert cross_entropy(scores, labels) <= cross_entropy(torch.zeros(40, 2), labels) + 1e-6, "confidence comes down"
    assert found.weight.abs().max() < unscaled.weight.abs().max()
    fold_of = discriminant._folds(labels)
    for fold in range(FOLDS):
        assert torch.bincount(labels[fold_of == fold]).tolist() == [4, 4]


@pytest.mark.parametrize("distance", [0.0, 0.2, 0.5])
def test_the_factor_has_the_least_cross_entropy(distance: float) -> None:
    features, labels = gaussians(60, 20, 3, seed=3, distance=distance)
    _, scores = fit_discriminant(features, labels, 3, True)
    prior = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    best = cross_entropy(scores, labels)
    for factor in (0.9, 1.1):
        assert best <= cross_entropy(prior + factor * (scores - prior), labels) + 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_without_a_bias_the_common_mean_stands_in_for_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without shrinkage the logits are the closest linear functions of the features to those with a bias."""
    monkeypatch.setattr(discriminant, "shrunk_covariance", lambda rows: rows.T @ rows / len(rows))
    monkeypatch.setattr(discriminant, "_best_factor", lambda *_: 1.0)
    features, labels = gaussians(500, 30, 2, seed)
    with_bias, without = (fit_discriminant(features, labels, 2, has_bias)[0] for has_bias in (True, False))
    assert not without.bias.any()
    closest = torch.linalg.lstsq(features, with_bias.logits(features)).solution.T
    torch.testing.assert_close(without.weight, closest, rtol=1e-6, atol=1e-8)


def test_the_cross_validation_without_a_bias_is_of_heads_without_one() -> None:
    features, labels = gaussians(60, 4, 2)
    with_bias, without = (fit_discriminant(features - features.mean(0), labels, 2, has)[1] for has in (True, False))
    assert not torch.allclose(with_bias, without)


def test_logits_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    monkeypatch.setattr(discriminant, "_best_factor", lambda *_: 1.0)
    monkeypatch.setattr(discriminant, "shrunk_covariance", lambda rows: rows.T @ rows / len(rows))
    features, labels = gaussians(90, 4, 3)
    labels[:20] = 0
    found, _ = fit_discriminant(features, labels, 3, True)
    expected = LinearDiscriminantAnalysis(solver="lsqr").fit(features.numpy(), labels.numpy())
    torch.testing.assert_close(
        found.logits(features).softmax(1),
        torch.from_numpy(expected.predict_proba(features.numpy())),
        rtol=1e-6,
        atol=1e-9,
    )
