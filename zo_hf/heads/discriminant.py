"""Linear discriminant analysis: the linear classifier of classes that are Gaussian with a common covariance.

With features x, class means m_k, their mean m over rows, class frequencies π_k, and a covariance S within classes:

    logit_k(x) = τ · ((m_k - m)ᵀ S⁻¹ (x - m) - ½ (m_k - m)ᵀ S⁻¹ (m_k - m)) + log π_k

Rows are often fewer than features, so S is shrunk towards a multiple of the identity, by the amount of Ledoit and Wolf (2004,
"A well-conditioned estimator for large-dimensional covariance matrices", Journal of Multivariate Analysis 88), with N rows
and d features:

    S = (1 - a) · S_N + a · (tr S_N / d) · I        a = min(1, (Σ_i ‖x_i‖⁴/N² - ‖S_N‖²/N) / ‖S_N - (tr S_N / d) · I‖²)

Fisher (1936) had the direction S⁻¹(m_1 - m_2) of two classes. The factor τ corrects the overconfidence of means and covariances
that come from few rows: it minimizes the cross entropy of rows that were left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Parts of the cross validation that chooses τ.
FOLDS = 5
#: τ lies below this: a value above 1 says that the discriminant was not confident enough.
LARGEST_FACTOR = 4.0


@dataclass(frozen=True)
class Discriminant:
    """A linear classifier.

    Attributes:
        weight: (classes, features), float64.
        bias: (classes,), float64; zero if the classifier has to do without one.
    """

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits, (rows, classes), of features, (rows, features)."""
        return features @ self.weight.T + self.bias


def fit_discriminant(
    features: Tensor, labels: Tensor, num_classes: int, has_bias: bool
) -> tuple[Discriminant, Tensor]:
    """Fit the discriminant, and predict every row by one that was fitted without it.

    Args:
        features: (rows, features), float64.
        labels: (rows,), integers from 0 to num_classes - 1; every class has two rows or more.
        num_classes: number of classes.
        has_bias: whether the classifier may have a bias.

    Returns:
        The discriminant of all rows; and the logits, (rows, num_classes), of the cross validation.
    """
    prior = (torch.bincount(labels, minlength=num_classes).to(features.dtype) / len(labels)).log()
    scores = torch.empty(len(labels), num_classes, dtype=features.dtype)
    offsets = prior.repeat(len(labels), 1)
    fold_of = _folds(labels)
    for fold in range(FOLDS):
        inside = fold_of == fold
        if inside.any():
            others = features[~inside]
            part = _unscaled(others, labels[~inside], num_classes)
            offset = Discriminant(torch.zeros_like(others[:1]), prior)
            if not has_bias:
                constant = _nearly_one(others)
                part, offset = _without_bias(part, constant), _without_bias(offset, constant)
            scores[inside], offsets[inside] = part.logits(features[inside]), offset.logits(features[inside])
    factor = _best_factor(scores, labels, offsets)
    whole = _unscaled(features, labels, num_classes)
    found = Discriminant(factor * whole.weight, factor * whole.bias + prior)
    return (found if has_bias else _without_bias(found, _nearly_one(features))), factor * scores + offsets


def _unscaled(features: Tensor, labels: Tensor, num_classes: int) -> Discriminant:
    """Return the discriminant with τ = 1 and without the frequencies of classes."""
    center = features.mean(0)
    means = torch.stack([features[labels == index].mean(0) for index in range(num_classes)])
    shift = means - center
    weight = _solved(shrunk_covariance(features - means[labels]), shift.T).T
    return Discriminant(weight, -0.5 * (weight * shift).sum(1) - weight @ center)


def shrunk_covariance(centered: Tensor) -> Tensor:
    """Return the covariance, (features, features), of centered rows, (rows, features), shrunk as Ledoit and Wolf did."""
    rows, size = centered.shape
    covariance = centered.T @ centered / rows
    scale = covariance.trace() / size
    norm = torch.linalg.vector_norm(covariance)
    covariance.diagonal().sub_(scale)
    distance = torch.linalg.vector_norm(covariance).square()
    error = (centered.square().sum(1).square().sum() / rows - norm.square()) / rows
    amount = (error / distance).clamp(0, 1) if distance > 0 else torch.ones((), dtype=centered.dtype)
    # A floor keeps the matrix invertible where features do not vary at all.
    floor = torch.finfo(centered.dtype).eps * max(scale.item(), 1.0)
    covariance.mul_(1 - amount).diagonal().add_(scale + floor)
    return covariance


def _solved(covariance: Tensor, right: Tensor) -> Tensor:
    """Return covariance⁻¹ right, (features, columns); the shortest solution where the covariance is singular."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        return torch.linalg.lstsq(covariance, right, driver="gelsd").solution
    return torch.cholesky_solve(right, factor)


def _nearly_one(features: Tensor) -> Tensor:
    """Return the linear function, (features,), that is closest to 1 on features, (rows, features).

    Features have a common mean, along which they hardly vary, so that this function is nearly constant.
    """
    mean = features.mean(0)
    solved = _solved(shrunk_covariance(features - mean), mean[:, None])[:, 0]
    return solved / (1 + mean @ solved)


def _without_bias(found: Discriminant, constant: Tensor) -> Discriminant:
    """Return a classifier without a bias: the bias times a linear function that is nearly 1."""
    return Discriminant(found.weight + torch.outer(found.bias, constant), torch.zeros_like(found.bias))


def _folds(labels: Tensor) -> Tensor:
    """Return the part of the cross validation that each row is in, (rows,): each part has as many rows of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class = order[labels[order].argsort(stable=True)]
    fold_of = torch.empty(len(labels), dtype=torch.long)
    fold_of[by_class] = torch.arange(len(labels)) % FOLDS
    return fold_of


def _best_factor(scores: Tensor, labels: Tensor, offsets: Tensor) -> float:
    """Return the τ with the least cross entropy, which is convex in τ, by halving the interval where its slope changes sign."""
    of_labels = scores.gather(1, labels[:, None]).mean()
    low, high = 0.0, LARGEST_FACTOR
    for _ in range(50):
        factor = (low + high) / 2
        slope = ((factor * scores + offsets).softmax(1) * scores).sum(1).mean() - of_labels
        low, high = (low, factor) if slope > 0 else (factor, high)
    return low
