"""Text that the model itself writes, as data-free calibration takes it: LLM-QAT (Liu et al., arXiv 2305.17888).

A row's first token is uniform over the vocabulary. Every other one is sampled from the model's own prediction p, by one
number u per token, uniform in (0, 1), from the seed:

    token = min {k : p_0 + … + p_k > u}

Inputs of layers have other correlations with such text than with random tokens, and about those with real text. The
text depends on the weights and the seed alone, so every process samples the same, and a replay does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zo_hf.rng import Stream, draw_half_words
from zo_hf.subspaces.peft_methods import base_model
from zo_hf.subspaces.random_tokens import random_tokens, reads_tokens, without_trace


def writes_text(model: nn.Module) -> bool:
    """Return True for a causal transformers model that reads `input_ids`."""
    inner = base_model(model)
    return (
        isinstance(inner, PreTrainedModel)
        and reads_tokens(model)
        and inner.can_generate()
        and not inner.config.is_encoder_decoder
    )


def sample_text(model: nn.Module, rows: int, length: int, stream: Stream) -> dict[str, Tensor]:
    """Let a causal model write rows of text.

    Args:
        model: a model that `writes_text`.
        rows: number of rows.
        length: tokens in a row; fewer if the model reads no more.
        stream: source of the first tokens, and of u.

    Returns:
        `input_ids`, int64 (rows, length).
    """
    first = random_tokens(model, rows, length, stream)["input_ids"]
    length = first.shape[1]
    words = draw_half_words(stream, "own text", 0, 2 * rows * length).double().view(2, length, rows)
    uniform = ((words[0] + 0.5) / 2**16 + words[1]) / 2**16
    text = first[:, :1]
    cache: dict[str, Any] = {}
    with without_trace(model):
        for position in range(1, length):
            output = model(input_ids=text[:, -1:] if cache else text, use_cache=True, **cache)
            cache = _cache_of(output)
            token = _sample(output.logits[:, -1], uniform[position])
            text = torch.cat([text, token[:, None].to(text.device)], 1)
    return {"input_ids": text}


def _cache_of(output: Any) -> dict[str, Any]:
    """Return the cached keys and values, by the name of the argument that takes them; empty if the model returns none."""
    cache = output.get("past_key_values")
    return {} if cache is None else {"past_key_values": cache}


def _sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample a token per row, int64 (rows,), given logits (rows, vocabulary) and u, float64 (rows,)."""
    # On the CPU and in float64, so that no kind of device adds up the probabilities of a large vocabulary in its own way.
    cumulative = logits.double().cpu().softmax(-1).cumsum(-1)
    chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return chosen.clamp(max=logits.shape[-1] - 1)
