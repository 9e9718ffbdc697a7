"""Who answers which prompt, and the losses of members."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from zo_hf.rewards.fitness import FITNESS
from zo_hf.rewards.population import assign, losses_of_members

SIZES = st.tuples(st.integers(1, 8), st.integers(1, 6)).flatmap(
    lambda s: st.tuples(st.just(s[0]), st.just(s[1]), st.integers(1, s[1]), st.integers(0, 20))
)


@given(SIZES)
def test_every_prompt_has_its_pairs_and_every_member_as_many_prompts(sizes: tuple[int, int, int, int]) -> None:
    prompts, pairs, each, first = sizes
    assignment = assign(prompts, first, pairs, each)
    of_prompt = [[a.member for a in assignment.answers if a.prompt == prompt] for prompt in range(prompts)]
    for number, members in enumerate(of_prompt, first):
        expected = {(number * each + i) % pairs for i in range(each)}
        assert sorted(members) == members == sorted(2 * pair + sign for pair in expected for sign in (0, 1))
    rows = len(assignment.prompts) // (2 * pairs)
    for answer in assignment.answers:
        assert answer.row // rows == answer.member and assignment.prompts[answer.row] == answer.prompt
    assert len({answer.row for answer in assignment.answers}) == len(assignment.answers) == 2 * each * prompts
    if prompts * each % pairs == 0:
        assert len(assignment.prompts) == len(assignment.answers)  # nobody answers for nothing


@given(SIZES, st.sampled_from([*FITNESS]), st.integers(0, 1000))
def test_losses(sizes: tuple[int, int, int, int], fitness: str, seed: int) -> None:
    prompts, pairs, each, first = sizes
    assignment = assign(prompts, first, pairs, each)
    rewards = torch.randint(0, 4, (len(assignment.answers),), generator=torch.Generator().manual_seed(seed)).double()
    eps = 0.25
    losses = losses_of_members(rewards, assignment, 2 * pairs, fitness, eps)
    torch.testing.assert_close(losses.mean(), -rewards.mean())
    # The slopes that the estimator finds, against the formula at the top of the module.
    scores = FITNESS[fitness](rewards.view(prompts, -1)).flatten().tolist()
    for pair in range(pairs):
        by_sign = [
            sum(score for score, a in zip(scores, assignment.answers, strict=True) if a.member == 2 * pair + sign)
            for sign in (0, 1)
        ]
        scale = 2 * eps if fitness == "raw" else 2.0
        expected = -pairs / (each * prompts) * (by_sign[0] - by_sign[1]) / scale
        found = (losses[2 * pair] - losses[2 * pair + 1]) / (2 * eps)
        torch.testing.assert_close(found.item(), expected, atol=1e-9, rtol=1e-9)


def test_batches_of_a_step_add_up() -> None:
    # Four prompts at once, and two batches of two, have the same answers.
    whole = assign(4, 0, 4, 2).answers
    halves = [*assign(2, 0, 4, 2).answers, *assign(2, 2, 4, 2).answers]
    expected = [(a.prompt, a.member) for a in whole]
    assert [(a.prompt + 2 * (i >= 8), a.member) for i, a in enumerate(halves)] == expected
