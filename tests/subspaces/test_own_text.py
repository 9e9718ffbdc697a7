"""Text that a model writes: against a plain loop without a cache, and what it depends on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, MambaConfig, MambaForCausalLM

from tests.conftest import seeded, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_opt, tiny_t5
from zo_hf.rng import Purpose, Stream, draw_half_words
from zo_hf.subspaces.own_text import sample_text, writes_text
from zo_hf.subspaces.random_tokens import random_tokens

STREAM = Stream(3, 7, purpose=Purpose.ROUNDING)


def tiny_mamba() -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, expand=2))


def sharpened(build: Callable[..., nn.Module]) -> nn.Module:
    """A model whose predictions are far from uniform, so that a token depends on those before it."""
    model = seeded(build)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.mul_(4 if "conv" not in name else 1)
    return model


def plain_text(model: nn.Module, rows: int, length: int) -> Tensor:
    """The same text, sampled row by row from whole forward passes, without a cache, by a search in Python."""
    text = random_tokens(model, rows, length, STREAM)["input_ids"][:, :1]
    length = min(length, getattr(model.config, "max_position_embeddings", length))
    words = draw_half_words(STREAM, "own text", 0, 2 * rows * length).tolist()
    for position in range(1, length):
        with torch.no_grad():
            probabilities = model(text).logits[:, -1].double().softmax(-1).tolist()
        tokens = []
        for row in range(rows):
            low, high = words[position * rows + row], words[(length + position) * rows + row]
            sums = list(accumulate(probabilities[row]))
            tokens.append(
                [next(token for token, total in enumerate(sums) if total > (high + (low + 0.5) / 2**16) / 2**16)]
            )
        text = torch.cat([text, torch.tensor(tokens)], 1)
    return text


@pytest.mark.parametrize("build", [tiny_llama, tiny_opt, tiny_gpt2, tiny_mixtral, tiny_mamba])
def test_text_is_that_of_a_plain_loop(build: Callable[..., nn.Module]) -> None:
    """With a cache, and of a model that has none of keys and values."""
    model = sharpened(build).eval()
    text = sample_text(model, 5, 12, STREAM)["input_ids"]
    assert text.shape == (5, 12) and text.dtype == torch.int64
    assert torch.equal(text, plain_text(model, 5, 12))
    assert not torch.equal(text, random_tokens(model, 5, 12, STREAM)["input_ids"])


def test_tokens_are_as_frequent_as_the_model_predicts() -> None:
    model = sharpened(tiny_llama).eval()
    model.get_input_embeddings().weight.data[:] = model.get_input_embeddings().weight.data[0].clone()
    with torch.no_grad():
        expected = model(torch.zeros(1, 1, dtype=torch.int64)).logits[0, -1].double().softmax(-1)
    rows = 20_000
    second = sample_text(model, rows, 2, STREAM)["input_ids"][:, 1]
    found = torch.bincount(second, minlength=len(expected)) / rows
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / rows).sqrt() + 1e-9).all()


def test_sampling_leaves_no_trace_and_depends_on_nothing_else() -> None:
    model = sharpened(tiny_llama).train()
    state = torch.get_rng_state()
    expected = sample_text(model, 4, 8, STREAM)["input_ids"]
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())
    torch.rand(3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(sample_text(model, 4, 8, STREAM)["input_ids"], expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample_text(model, 4, 8, STREAM)["input_ids"], expected)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not torch.equal(sample_text(model, 4, 8, Stream(4, 7))["input_ids"], expected)


def test_models_that_predict_no_next_token_write_nothing() -> None:
    classifier = LlamaForSequenceClassification(tiny_llama().config)
    assert not any(writes_text(model) for model in (tiny_bert(), tiny_t5(), classifier, nn.Linear(2, 2)))
    assert all(writes_text(build()) for build in (tiny_llama, tiny_opt, tiny_gpt2, tiny_mamba))
