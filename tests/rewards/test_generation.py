"""All members answer in one generation, token for token as each of them alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import CAUSAL_MODELS, seeded
from tests.rewards.runs import config, prompts, tokenizer
from tests.trainer.runs import with_lora
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import NotBatchable
from zo_hf.rewards.generation import Generator
from zo_hf.rewards.population import assign
from zo_hf.rewards.prompts import PromptCollator

EPS, PAIRS = 0.3, 2
CACHES = {
    "cache": {},
    "no cache": {"generation_kwargs": {"use_cache": False}},
    "static": {"cache_implementation": "static"},
}
BATCH = PromptCollator(tokenizer(), 0, None, {})(list(prompts(3)))
FIRST = 5


def answers(
    model: nn.Module, batched: Any, subspace: str = "auto", **options: Any
) -> tuple[list[list[int]], ZerothOrder]:
    """The answers of two pairs to three prompts of one to three words, so two rows have padding."""
    args = config("unused", max_completion_length=5, population=4, zo_batched_probes=batched, **options)
    zo = ZerothOrder(model, subspace=subspace, num_directions=PAIRS, eps=EPS, batched_probes=batched)
    generator = Generator(lambda: model, args, 0, [1], torch.no_grad)
    rows = assign(3, FIRST, PAIRS, PAIRS).prompts

    def at(probes: Any, each: int) -> Any:
        return zo.subspace.at(probes, zo._stream, zo.distribution, rows=each)

    try:
        return generator.answers_of_members(BATCH, rows, FIRST, zo, zo.estimator.probes(), at), zo
    finally:
        zo.subspace.detach()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("architecture", CAUSAL_MODELS)
def test_token_for_token(architecture: str, cache: str, temperature: float) -> None:
    model = seeded(CAUSAL_MODELS[architecture])
    options = CACHES[cache] | {"temperature": temperature}
    together, zo = answers(model, "auto", **options)
    assert zo.evaluator.batched
    alone, _ = answers(model, False, **options)
    assert together == alone
    assert len({tuple(answer) for answer in together}) > 3  # the members differ


@pytest.mark.parametrize("subspace", ["full", "adapter", "norms"])
def test_in_every_subspace(subspace: str) -> None:
    model = seeded(CAUSAL_MODELS["llama"])
    model = with_lora(model) if subspace == "adapter" else model
    together, zo = answers(model, "auto", subspace)
    assert zo.evaluator.batched and together == answers(model, False, subspace)[0]


def test_a_model_that_members_cannot_share(caplog: pytest.LogCaptureFixture) -> None:
    # The router of a mixture of experts is read outside of its module's forward, and its LoRA weights with it.
    model = with_lora(seeded(CAUSAL_MODELS["mixtral"]))
    with caplog.at_level(logging.WARNING, "zo_hf"):
        found, zo = answers(model, "auto")
    assert zo.evaluator.batched is False
    (line,) = [record.getMessage() for record in caplog.records if "alone" in record.getMessage()]
    assert "is read outside of its module's forward" in line
    assert found == answers(model, False)[0]
    with pytest.raises(NotBatchable, match=r"zo_batched_probes=True cannot generate .* use zo_batched_probes='auto'"):
        answers(model, True)


def test_rows_that_depend_on_each_other_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(CAUSAL_MODELS["llama"])
    model.lm_head.register_forward_hook(lambda module, args, output: output - 0.1 * output.mean(0, keepdim=True))
    with caplog.at_level(logging.WARNING, "zo_hf"):
        _, zo = answers(model, "auto")
    assert zo.evaluator.batched is False and "the scores of token 1 differ" in caplog.text


def test_one_batch_may_fail(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(CAUSAL_MODELS["llama"])
    expected, _ = answers(model, False)
    generate = model.generate

    def fails(**inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("no memory")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", fails)
    with caplog.at_level(logging.WARNING, "zo_hf"):
        found, _ = answers(model, True)
    assert found == expected and "OutOfMemoryError: no memory" in caplog.text


def test_an_answer_ends_with_its_end() -> None:
    model = seeded(CAUSAL_MODELS["llama"])
    longest, _ = answers(model, False)
    end = longest[0][2]
    model.generation_config.eos_token_id = None
    args = config("unused", max_completion_length=5)
    generator = Generator(lambda: model, args, 0, [end], torch.no_grad)
    found = generator.answers(BATCH, [0, 1, 2], 0, 0)
    plain = Generator(lambda: model, args, 0, [], torch.no_grad).answers(BATCH, [0, 1, 2], 0, 0)
    assert found == [answer[: answer.index(end) + 1] if end in answer else answer for answer in plain]
    assert all(len(answer) == 5 for answer in plain)
