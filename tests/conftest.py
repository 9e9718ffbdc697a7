"""Tiny models of every architecture the tests need, built from configs, and data they can learn."""

from __future__ import annotations

import gc
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 100
LENGTH = 12


# Models this small are slower on several threads, and far slower when the cores are busy.
torch.set_num_threads(1)


# A process that was started in the background ignores Ctrl-C, and passes that on.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Made by slowest.py.
SLOW = frozenset(Path(__file__).with_name("slow.txt").read_text(encoding="utf-8").splitlines())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases of slow.txt before pytest selects by marks."""
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Keep what the imports left out of the garbage collection with which Trainer begins every training."""
    gc.collect()
    gc.freeze()


def tiny_opt(**options) -> OPTForCausalLM:
    config = {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
    return OPTForCausalLM(OPTConfig(**config | options))


def tiny_llama(**options) -> LlamaForCausalLM:
    config = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**config | {"pad_token_id": 0} | options))


def tiny_gpt2(**options) -> GPT2LMHeadModel:
    config = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**config | {"bos_token_id": 0, "eos_token_id": 0} | options))


def tiny_mixtral(**options) -> MixtralForCausalLM:
    config = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**config | options))


def tiny_bert(**options) -> BertForSequenceClassification:
    config = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "max_position_embeddings": 64, "num_labels": 2}
    return BertForSequenceClassification(BertConfig(**config | options))


def tiny_t5(**options) -> T5ForConditionalGeneration:
    config = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**config | {"decoder_start_token_id": 0} | options))


def tiny_bart(**options) -> BartForConditionalGeneration:
    config = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.1}
    config |= {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    }
    return BartForConditionalGeneration(BartConfig(**config | {"max_position_embeddings": 64} | options))


CAUSAL_MODELS = {"opt": tiny_opt, "llama": tiny_llama, "gpt2": tiny_gpt2, "mixtral": tiny_mixtral}


def seeded(build, dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> nn.Module:
    """A model from `build` whose weights depend on `seed` alone, in evaluation mode."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed spends a millisecond on the other devices
    try:
        return build(**options).to(dtype).eval()
    finally:
        torch.set_rng_state(state)


def causal_batch(rows: int = 4, length: int = LENGTH, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, of which only the last is a label, as in a prompt with a verbaliser."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def translation_batch(rows: int = 4, length: int = LENGTH, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random sentences for an encoder-decoder, padded, with other numbers of labels."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(3, VOCABULARY, (2, rows, length), generator=generator)
    mask = (torch.arange(length) < length - torch.arange(rows)[:, None] % 3).long()
    labels = labels[:, : length // 2].contiguous()
    labels[torch.arange(length // 2) > 1 + torch.arange(rows)[:, None] % 4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class TinyTask(torch.utils.data.Dataset):
    """Sequences whose last token repeats their fourth: 5 or 6. A causal model learns it in some hundred steps."""

    def __init__(self, size: int = 64) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(7, VOCABULARY, (LENGTH,), generator=generator)
        ids[3] = ids[-1] = 5 + index % 2
        labels = torch.full_like(ids, -100)
        labels[-1] = ids[-1]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers, as they are in memory, even between two folds."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        assert torch.equal(actual[name], expected[name]), name
