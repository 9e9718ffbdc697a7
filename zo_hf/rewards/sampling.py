"""Sampling with random numbers that all members share (common random numbers).

A token drawn from softmax(scores / temperature) is the argmax of scores / temperature + G. Every token has a standard
Gumbel number of its own in G:

    G = -log E,  E = -log(1 - v),  v uniform in (0, 1)

G comes from the counter-based generator, keyed on (seed, step, prompt, position, token). Members that answer the same
prompt therefore differ by their weights alone, and no global random number is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from zo_hf.rewards.config import EvolutionConfig
from zo_hf.rng import Purpose, Stream
from zo_hf.rng.draw import draw_slice


class Gumbel:
    """Standard Gumbel numbers, from 32 bits each."""

    elements_per_block: ClassVar[int] = 4

    @staticmethod
    def decode(packed: Tensor) -> Tensor:
        """Turn packed blocks, int64 of shape (n, 2), into float32 of shape (n * 4,)."""
        words = packed.view(torch.int32).to(torch.int64).bitwise_and_(0xFFFFFFFF).flatten()
        # A float32 below 2**-8 has all of the bits, so large numbers, which win, are exact. v = 1 would give -inf.
        uniform = words.float().add_(0.5).mul_(2.0**-32).clamp_(max=1.0 - 2.0**-24)
        return torch.log1p(uniform.neg_()).neg_().log_().neg_()


class SharedNoise(LogitsProcessor):
    """Adds the same Gumbel numbers to the scores of all members that answer a prompt.

    Args:
        seed: seed of the run.
        step: step of the run.
        prompts: number of every row's prompt within the step, (rows,).
        start: number of tokens before the first generated one.
    """

    def __init__(self, seed: int, step: int, prompts: Sequence[int], start: int) -> None:
        self._start = start
        distinct = sorted(set(prompts))
        self._streams = [Stream(seed, step, prompt, Purpose.SAMPLING) for prompt in distinct]
        self._rows = torch.tensor([distinct.index(prompt) for prompt in prompts])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores with noise; input_ids: (rows, tokens), scores: (rows, vocabulary)."""
        vocabulary = scores.shape[1]
        first = (input_ids.shape[1] - self._start) * vocabulary
        noise = torch.stack(
            [draw_slice(s, "gumbel", first, first + vocabulary, Gumbel(), scores.device) for s in self._streams]
        )
        return scores + noise[self._rows.to(scores.device)]


def sampler(config: EvolutionConfig, step: int, prompts: Sequence[int], start: int) -> LogitsProcessorList:
    """Return the processors that turn greedy decoding into sampling; none with temperature 0.

    Args:
        config: the temperature, top_k, top_p and min_p.
        step, prompts, start: see `SharedNoise`.
    """
    processors = LogitsProcessorList()
    if not config.temperature:
        return processors
    if config.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1.0:
        processors.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        processors.append(MinPLogitsWarper(config.min_p))
    processors.append(SharedNoise(config.seed, step, prompts, start))
    return processors
