"""Answers of the members to a batch of prompts, in one generation for all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import NotBatchable, Probe
from zo_hf.evaluation.evaluate import At
from zo_hf.evaluation.precision import rounding
from zo_hf.reason import reason_of
from zo_hf.rewards.config import EvolutionConfig
from zo_hf.rewards.prompts import up_to_end
from zo_hf.rewards.sampling import sampler

logger = logging.getLogger(__name__)

#: Tokens that are compared before all members share a generation. The second one reads the cache.
_COMPARED = 2


class Generator:
    """Generates answers to prompts.

    Args:
        model: returns the causal language model, which may get an adapter when training ends.
        config: how to choose tokens.
        pad_token_id: the token after the end of an answer.
        end_token_ids: tokens that end an answer.
        context: returns the context of a forward pass, such as autocast.
    """

    def __init__(
        self,
        model: Callable[[], Any],
        config: EvolutionConfig,
        pad_token_id: int,
        end_token_ids: Sequence[int],
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._model, self._config, self._context = model, config, context
        arguments = {"pad_token_id": pad_token_id, "eos_token_id": list(end_token_ids) or None}
        self._arguments = arguments | config.generation_arguments()
        ends = self._arguments["eos_token_id"] or []
        self.ends = frozenset([ends] if isinstance(ends, int) else ends)
        self._has_failed = False

    @torch.no_grad()
    def answers(self, batch: Mapping[str, Any], rows: Sequence[int], first: int, step: int) -> list[list[int]]:
        """Return the tokens of one answer for every row, up to the one that ends it.

        Args:
            batch: prompts, as `PromptCollator` makes them, on the model's device.
            rows: index of every row's prompt within the batch.
            first: number of the batch's first prompt within the step.
            step: step of the run.
        """
        start = batch["input_ids"].shape[1]
        processors = sampler(self._config, step, [first + row for row in rows], start)
        return [up_to_end(tokens, self.ends) for tokens in self._tokens(batch, rows, processors).tolist()]

    def answers_of_members(
        self,
        batch: Mapping[str, Any],
        rows: Sequence[int],
        first: int,
        zo: ZerothOrder,
        probes: Sequence[Probe],
        at: At,
    ) -> list[list[int]]:
        """Return the answers of all members, which have the same number of consecutive rows each.

        Args:
            batch, rows, first: as for `answers`.
            zo: the engine, which keeps the choice between one generation for all members and one for each.
            probes: the members.
            at: enters the context of some members, see `JointLoss`.

        Raises:
            NotBatchable: one generation for all members was requested, and the model cannot do it.
        """
        each = len(rows) // len(probes)
        if zo.evaluator.batched is None:
            self._decide(batch, rows, zo, probes, at)
        if zo.evaluator.batched:
            try:
                with at(probes, each):
                    return self.answers(batch, rows, first, zo.step)
            except Exception as error:  # out of memory, or a module that members cannot share
                self._note_failure(error)
        # Outside of the handler, so that the memory of a failed generation has been given back.
        found = []
        for member, probe in enumerate(probes):
            with at((probe,), 0):
                found += self.answers(batch, rows[member * each : (member + 1) * each], first, zo.step)
        return found

    def _tokens(
        self, batch: Mapping[str, Any], rows: Sequence[int], processors: LogitsProcessorList, **more: Any
    ) -> Tensor:
        """Return generated tokens, (rows, longest answer)."""
        inputs = {name: batch[name][list(rows)] for name in ("input_ids", "attention_mask")}
        generation = GenerationConfig(**self._arguments | more)
        with self._context():
            found = self._model().generate(**inputs, generation_config=generation, logits_processor=processors)
        return found[:, inputs["input_ids"].shape[1] :]

    def _note_failure(self, error: Exception) -> None:
        if isinstance(error, NotBatchable) and self._config.zo_batched_probes is True:
            raise NotBatchable(
                f"zo_batched_probes=True cannot generate for all members at once: {error}; use zo_batched_probes='auto'."
            ) from error
        if not self._has_failed:
            logger.warning(
                "a generation for all members failed (%s: %s); a batch like this is answered by one member at a time",
                type(error).__name__,
                reason_of(error),
            )
        self._has_failed = True

    def _decide(
        self, batch: Mapping[str, Any], rows: Sequence[int], zo: ZerothOrder, probes: Sequence[Probe], at: At
    ) -> None:
        """Choose one generation for all members if the first and the last one find the same scores in it as alone."""
        each, last, problem = len(rows) // len(probes), len(probes) - 1, None
        try:
            with at(probes, each):
                together = self._look(batch, rows, [*range(each), *range(last * each, len(rows))])
            alone = []
            for member in (0, last):
                with at((probes[member],), 0):
                    alone.append(self._look(batch, rows[member * each : (member + 1) * each], range(each)))
            allowed = rounding(zo.evaluator.dtype_of_computation(zo.subspace, torch.float32))
            problem = _difference(together, [torch.cat(parts) for parts in zip(*alone, strict=True)], allowed)
        except Exception as error:  # out of memory, or a module that members cannot share
            problem = reason_of(error)
        zo.evaluator.forward_passes += len(probes)
        vote = torch.tensor(problem is None, device=batch["input_ids"].device)
        zo.evaluator.batched = zo.evaluator.all_reduce_and(vote)
        if not zo.evaluator.batched:
            logger.warning(
                "every member generates its answers alone, which is slower: %s", problem or "another process has to"
            )

    @torch.no_grad()
    def _look(self, batch: Mapping[str, Any], rows: Sequence[int], kept: Sequence[int]) -> list[Tensor]:
        """Return the scores of the first tokens of some rows, [(kept, vocabulary), ...], and then these tokens."""
        record = _Record(kept)
        length = min(_COMPARED, self._config.max_completion_length)
        limits = {"max_new_tokens": length, "min_new_tokens": length}
        tokens = self._tokens(batch, rows, LogitsProcessorList([record]), **limits)
        return [*record.scores, tokens[list(kept)]]


class _Record(LogitsProcessor):
    """Keeps the scores of some rows."""

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows = list(rows)
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores[self._rows])
        return scores


def _difference(together: Sequence[Tensor], alone: Sequence[Tensor], allowed: float) -> str | None:
    """Return how two results of `_look` differ, or None; scores that follow different tokens are not compared."""
    *scores, tokens = together
    *own_scores, own_tokens = alone
    for position, (score, own) in enumerate(zip(scores, own_scores, strict=True)):
        compares = (tokens[:, :position] == own_tokens[:, :position]).all(1)
        known = own.isfinite() & compares[:, None]
        if not bool(known.any()):
            continue
        apart, size = (score - own)[known].abs().max().item(), own[known].abs().max().clamp(min=1.0).item()
        if not apart <= allowed * size:
            return f"the scores of token {position + 1} differ by {apart:.2g}"
    return None
