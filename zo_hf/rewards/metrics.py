"""Numbers about rewards and answers, under the names of GRPO's log.

A batch is reduced to sums, which add up over micro-batches and processes. So the numbers do not depend on how a step is
divided.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_hf.parallel.ranks import Ranks

#: Standard deviations below this count as 0; TRL's.
_ZERO = 1e-8


class RewardMetrics:
    """Collects the metrics of training steps, or of an evaluation.

    Args:
        names: names of the reward functions.
        ranks: the processes that train together.
        device: device on which they communicate.
    """

    def __init__(self, names: Sequence[str], ranks: Ranks, device: torch.device) -> None:
        self._names, self._ranks, self._device = names, ranks, device
        self._steps: list[dict[str, float]] = []
        self._begin()

    def _begin(self) -> None:
        self._sums = torch.zeros(8 + 3 * len(self._names), dtype=torch.float64)
        self._shortest_longest = torch.full((2,), torch.inf, dtype=torch.float64)

    def see(self, rewards: Tensor, totals: Tensor, answers: Sequence[Sequence[int]], ends: frozenset[int]) -> None:
        """Add a batch.

        Args:
            rewards: of every answer by every function, (prompts · answers of each, functions), float64; NaN for None.
            totals: weighted sums over functions, (prompts, answers of each), float64.
            answers: tokens of every answer.
            ends: tokens that end an answer.
        """
        lengths = torch.tensor([len(answer) for answer in answers], dtype=torch.float64)
        ended = torch.tensor([bool(answer) and answer[-1] in ends for answer in answers])
        spread = totals - totals.mean(1, keepdim=True)
        zero = spread.square().mean(1).sqrt() <= _ZERO
        known, count = ~rewards.isnan(), torch.tensor(float(totals.numel()), dtype=torch.float64)
        of_answers = [count, totals.sum(), totals.square().sum(), torch.tensor(len(zero)), zero.sum()]
        of_lengths = [lengths.sum(), (~ended).sum(), lengths[ended].sum()]
        of_functions = [known.sum(0), rewards.nansum(0), rewards.square().nansum(0)]
        sums = torch.cat([value.double().flatten() for value in (*of_answers, *of_lengths, *of_functions)])
        extremes = torch.stack([lengths.min(), -lengths.max()])
        self._sums += sums
        self._shortest_longest = torch.minimum(self._shortest_longest, extremes)

    def end_step(self) -> None:
        """Combine the batches of a step on all ranks; every rank must call this."""
        sums = self._ranks.all_gather(self._on_wire(self._sums)).sum(0).tolist()
        extremes = self._ranks.all_gather(self._on_wire(self._shortest_longest)).amin(0).tolist()
        self._begin()
        self._steps.append(self._named(sums, extremes))

    def _on_wire(self, values: Tensor) -> Tensor:
        return values if self._ranks.grid.world_size == 1 else values.to(self._device)

    def _named(self, sums: Sequence[float], extremes: Sequence[float]) -> dict[str, float]:
        count, total, squares, prompts, zero, length, clipped, ended_length, *of_functions = sums
        functions = len(self._names)
        ended = count - clipped
        numbers = {"reward": total / count, "reward_std": _deviation(count, total, squares)}
        for i, name in enumerate(self._names):
            known, own, own_squares = of_functions[i::functions]
            if known:
                numbers[f"rewards/{name}/mean"] = own / known
                numbers[f"rewards/{name}/std"] = _deviation(known, own, own_squares)
        return numbers | {
            "frac_reward_zero_std": zero / prompts,
            "completions/mean_length": length / count,
            "completions/min_length": extremes[0],
            "completions/max_length": -extremes[1],
            "completions/clipped_ratio": clipped / count,
            "completions/mean_terminated_length": ended_length / ended if ended else 0.0,
        }

    def means(self) -> dict[str, float]:
        """Return the mean of every metric over the steps since the last call."""
        steps, self._steps = self._steps, []
        names = dict.fromkeys(name for step in steps for name in step)
        values = {name: [step[name] for step in steps if name in step] for name in names}
        return {name: sum(found) / len(found) for name, found in values.items()}


def _deviation(count: float, total: float, squares: float) -> float:
    """Return the sample standard deviation, 0 for a single number."""
    return float(max(0.0, squares - total * total / count) / (count - 1)) ** 0.5 if count > 1 else 0.0
