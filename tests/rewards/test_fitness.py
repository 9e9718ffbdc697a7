"""Fitness within a prompt, against GRPO's formula and scipy's ranks."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from zo_hf.rewards.fitness import centered_ranks, z_scores

REWARDS = st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=1, max_size=3)


@given(REWARDS)
def test_z_scores(rewards: list[list[int]]) -> None:
    given_ = torch.tensor(rewards, dtype=torch.float64)
    found = z_scores(given_)
    expected = (given_ - given_.mean(1, keepdim=True)) / (given_.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(found, expected)
    assert not found[(given_ == given_[:, :1]).all(1)].any()


def test_equal_rewards_have_exactly_no_fitness() -> None:
    assert not z_scores(torch.full((1, 6), 0.1, dtype=torch.float64)).any()


@given(REWARDS)
def test_centered_ranks(rewards: list[list[int]]) -> None:
    found = centered_ranks(torch.tensor(rewards, dtype=torch.float64))
    expected = torch.tensor([(rankdata(row) - 1) / 3 - 0.5 for row in rewards], dtype=found.dtype)
    torch.testing.assert_close(found, expected)
