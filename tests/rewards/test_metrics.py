"""Metrics of rewards and answers: against direct formulas, however a step is divided."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zo_hf.parallel.ranks import Ranks
from zo_hf.rewards.metrics import RewardMetrics

END = frozenset({1})


@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from([2, 4]), st.sampled_from([0.0, 1e6]))
def test_they_do_not_depend_on_how_a_step_is_divided(seed: int, prompts: int, each: int, level: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 3, (prompts * each, 2), generator=generator).double() + level
    rewards[torch.rand(prompts * each, generator=generator) < 0.3, 1] = math.nan
    totals = rewards.nansum(1).view(prompts, each)
    lengths = torch.randint(1, 5, (prompts * each,), generator=generator).tolist()
    answers = [[7] * (length - 1) + [1 + length % 2] for length in lengths]
    metrics = RewardMetrics(["first", "second"], Ranks(), torch.device("cpu"))
    for start in range(prompts):
        part = slice(start * each, (start + 1) * each)
        metrics.see(rewards[part], totals[start : start + 1], answers[part], END)
    metrics.end_step()
    found = metrics.means()
    assert metrics.means() == {}

    assert found["reward"] == pytest.approx(totals.mean().item(), rel=1e-12)
    assert found["reward_std"] == pytest.approx(totals.std().item(), abs=1e-2 if level else 1e-9)
    assert found["frac_reward_zero_std"] == pytest.approx(sum(len(set(row)) == 1 for row in totals.tolist()) / prompts)
    rated = rewards[:, 1][~rewards[:, 1].isnan()]
    if len(rated):
        assert found["rewards/second/mean"] == pytest.approx(rated.mean().item(), rel=1e-12)
    else:
        assert "rewards/second/mean" not in found
    assert found["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert (found["completions/min_length"], found["completions/max_length"]) == (min(lengths), max(lengths))
    ended = [length for length in lengths if length % 2 == 0]
    assert found["completions/clipped_ratio"] == pytest.approx(1 - len(ended) / len(lengths))
    assert found["completions/mean_terminated_length"] == pytest.approx(sum(ended) / len(ended) if ended else 0.0)
