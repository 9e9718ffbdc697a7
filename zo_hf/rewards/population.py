"""A population: who answers which prompt, and the losses of its members.

Member (j, ±) has the weights at ξ ± ε·z_j. Prompt number n of a step is answered by k pairs, one after another in a circle
of q pairs:

    pairs of n:  n·k, n·k + 1, ..., n·k + k - 1   modulo q

With k = q, every member answers every prompt. The loss of a member is minus its fitness, summed over its prompts and
divided by the number of prompts that it should have, P·k/q. The two-point estimate from these losses is

    c_j = -q / (k·P) · Σ_p (F(p, j+) - F(p, j-)) / 2ε        ĝ = 1/q · Σ_j c_j · z_j

so ĝ estimates the gradient of minus the mean fitness whatever k is. For a fitness that has no scale of its own (z-scores,
ranks), the losses also contain the factor ε. Then -ĝ is the mean over all answers of fitness times the member's own ±z. As
in Qiu et al., arXiv 2509.24372, the learning rate has the factor 1/ε in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_hf.rewards.fitness import FITNESS


@dataclass(frozen=True)
class Answer:
    """The place of one answer.

    Args:
        prompt: index of the prompt within the batch.
        member: index of the member among the step's probes.
        row: row of the answer in a generation for all members, which has the same number of rows for each, in order.
    """

    prompt: int
    member: int
    row: int


@dataclass(frozen=True)
class Assignment:
    """The answers to one batch of prompts.

    Attributes:
        answers: sorted by prompts, and then by members; every prompt has the same number of them.
        prompts: the prompt of every row of a generation for all members, (members · rows of each,). Where a member has
            fewer prompts than others, it answers one of them for nothing.
    """

    answers: Sequence[Answer]
    prompts: Sequence[int]


def assign(prompts: int, first: int, pairs: int, pairs_per_prompt: int) -> Assignment:
    """Decide who answers which prompt of a batch.

    Args:
        prompts: number of prompts of the batch.
        first: number of its first prompt within the step.
        pairs: q.
        pairs_per_prompt: k.
    """
    of_pair: list[list[int]] = [[] for _ in range(pairs)]
    for prompt in range(prompts):
        for i in range(pairs_per_prompt):
            of_pair[((first + prompt) * pairs_per_prompt + i) % pairs].append(prompt)
    most = max(map(len, of_pair))
    of_member = [of_pair[member // 2] for member in range(2 * pairs)]
    answers = [
        Answer(prompt, member, member * most + i)
        for member, own in enumerate(of_member)
        for i, prompt in enumerate(own)
    ]
    rows = [prompt for own in of_member for prompt in (own + [0] * most)[:most]]
    return Assignment(sorted(answers, key=lambda a: (a.prompt, a.member)), rows)


def losses_of_members(rewards: Tensor, assignment: Assignment, members: int, fitness: str, eps: float) -> Tensor:
    """Return the loss of every member, (members,), float64; their mean is minus the mean reward.

    Args:
        rewards: the reward of every answer, (answers,), float64.
        assignment: the place of every answer.
        members: number of members.
        fitness: name of the fitness.
        eps: distance of the members from the present weights.
    """
    prompts = 1 + assignment.answers[-1].prompt
    scores = FITNESS[fitness](rewards.view(prompts, -1)).flatten()
    of_answer = torch.tensor([answer.member for answer in assignment.answers])
    mean = torch.zeros(members, dtype=torch.float64).index_add_(0, of_answer, scores) * members / len(scores)
    return -mean if fitness == "raw" else -rewards.mean() - eps * mean
