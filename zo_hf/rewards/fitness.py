"""Fitness: the score of every answer among the answers to the same prompt.

z_score         F = (r - mean) / (s + 1e-4)     s: the sample standard deviation, as in GRPO's advantages
centered_ranks  F = rank(r) / (n - 1) - 1/2     equal rewards share the mean of their ranks (Salimans et al.,
                                                arXiv 1703.03864)
raw             F = r
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

#: Added to the standard deviation; GRPO's.
_SMALL = 1e-4


def z_scores(rewards: Tensor) -> Tensor:
    """Return the z-scores within each prompt; rewards: (prompts, answers), float64. Equal rewards give exactly 0."""
    centered = rewards - rewards.mean(1, keepdim=True)
    scores = centered / (rewards.std(1, keepdim=True) + _SMALL)
    return scores.masked_fill((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0)


def centered_ranks(rewards: Tensor) -> Tensor:
    """Return the centered ranks within each prompt, in [-1/2, 1/2]; rewards: (prompts, answers), float64."""
    smaller = (rewards[:, :, None] > rewards[:, None, :]).sum(2)
    equal = (rewards[:, :, None] == rewards[:, None, :]).sum(2) - 1
    return (smaller + equal / 2).double() / (rewards.shape[1] - 1) - 0.5


def raw(rewards: Tensor) -> Tensor:
    """Return the rewards."""
    return rewards


#: By the name of the option.
FITNESS: dict[str, Callable[[Tensor], Tensor]] = {"z_score": z_scores, "centered_ranks": centered_ranks, "raw": raw}
