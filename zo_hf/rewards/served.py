"""Answers of the members to a batch of prompts, from servers that hold the members as adapters.

A temperature of 0 takes the likeliest token. With another one, each request has a seed, keyed on (seed, step, prompt).
A server that draws a request's noise from its seed, as vLLM does, then gives all members that answer a prompt the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.evaluation.evaluate import At
from zo_hf.rewards.config import EvolutionConfig
from zo_hf.rewards.prompts import up_to_end
from zo_hf.rng import Purpose, Stream
from zo_hf.serving import ServedModel


class ServedGenerator:
    """Generates answers to prompts, as `Generator` does.

    Args:
        served: returns the served model.
        config: how to choose tokens.
        end_token_ids: tokens that end an answer.

    Attributes:
        ends: tokens that end an answer.
    """

    def __init__(
        self, served: Callable[[], ServedModel], config: EvolutionConfig, end_token_ids: Sequence[int]
    ) -> None:
        self._served, self._config, self.ends = served, config, frozenset(end_token_ids)

    def answers(self, batch: Mapping[str, Any], rows: Sequence[int], first: int, step: int) -> list[list[int]]:
        """Return the answers of the model as it is; the arguments are those of `Generator.answers`."""
        served = self._served()
        found = served.as_it_is(served.completions(self._prompts(batch, rows), self._options(rows, first, step)))
        return [up_to_end(tokens, self.ends) for tokens in found]

    def answers_of_members(
        self,
        batch: Mapping[str, Any],
        rows: Sequence[int],
        first: int,
        zo: ZerothOrder,
        probes: Sequence[Probe],
        at: At,
    ) -> list[list[int]]:
        """Return the answers of all members; the arguments are those of `Generator.answers_of_members`."""
        served, each = self._served(), len(rows) // len(probes)
        of_members = [rows[member * each : (member + 1) * each] for member in range(len(probes))]
        asks = [served.completions(self._prompts(batch, r), self._options(r, first, zo.step)) for r in of_members]
        return [
            up_to_end(tokens, self.ends)
            for found in served.at_probes(zo.subspace, probes, at, asks)
            for tokens in found
        ]

    def _prompts(self, batch: Mapping[str, Any], rows: Sequence[int]) -> list[list[int]]:
        """Return the tokens of prompts, without the padding on their left."""
        pairs = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
        prompts = [[token for token, is_kept in zip(ids, mask, strict=True) if is_kept] for ids, mask in pairs]
        return [prompts[row] for row in rows]

    def _options(self, rows: Sequence[int], first: int, step: int) -> dict[str, Any]:
        config = self._config
        options: dict[str, Any] = {
            "max_tokens": config.max_completion_length,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "min_p": config.min_p or 0.0,
            "repetition_penalty": config.repetition_penalty,
            "stop_token_ids": sorted(self.ends),
        }
        if config.temperature:
            streams = (Stream(config.seed, step, first + row, Purpose.SAMPLING) for row in rows)
            options["seed"] = [stream.key >> 1 for stream in streams]  # servers take 63 bits
        return options
