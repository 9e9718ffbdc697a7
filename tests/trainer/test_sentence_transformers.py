"""Trainers of sentence-transformers: their losses train, and one with weights of its own is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.conftest import assert_same_bits, weights_of
from tests.trainer.runs import config, logged
from zo_hf import ZOTrainer, forward_only

sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: E402

WORDS = [f"w{i}" for i in range(40)]
ZOTheirs, ZOTheirConfig = forward_only(SentenceTransformerTrainer, SentenceTransformerTrainingArguments)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny encoder without dropout, and its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16)
    shape = {"vocab_size": 42, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 16, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(**shape, hidden_dropout_prob=0, attention_probs_dropout_prob=0)).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return str(folder)


def embedder(encoder: str) -> Any:
    return SentenceTransformer(modules=[Transformer(encoder), Pooling(16)], device="cpu")


def pairs(rows: int = 8) -> Dataset:
    """Sentences with as many words in common as their label says."""
    one = [" ".join(WORDS[(i + j) % 40] for j in range(5)) for i in range(rows)]
    other = [" ".join(WORDS[(3 * i + j) % 40] for j in range(4)) for i in range(rows)]
    return Dataset.from_dict({"a": one, "b": other, "label": [i % 3 / 2 for i in range(rows)]})


def trainer_of(model: Any, folder: Path, loss: Any, kind: Any = ZOTheirs, **options: Any) -> ZOTrainer:
    arguments = config(folder, ZOTheirConfig, **{"zo_fold_steps": None} | options)
    data = pairs() if loss is losses.CoSENTLoss else pairs().remove_columns("label")
    return kind(model=model, args=arguments, train_dataset=data, eval_dataset=data, loss=loss(model))


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
@pytest.mark.parametrize("loss", [losses.MultipleNegativesRankingLoss, losses.CoSENTLoss])
def test_c_is_the_slope_of_a_loss_that_compares_rows(tmp_path: Path, encoder: str, loss: Any, subspace: str) -> None:
    model, reference = embedder(encoder), embedder(encoder)
    trainer = trainer_of(model, tmp_path, loss, max_steps=1, learning_rate=1e-2, zo_subspace=subspace)
    trainer.train()
    (c,) = logged(trainer, "zo/projected_grad")
    batch = next(iter(trainer.get_train_dataloader()))
    own = loss(reference)
    value = own(*trainer.collect_features(batch))
    value.backward()
    before = dict(reference.named_parameters())
    step = {name: (before[name] - p).detach() / (1e-2 * c) for name, p in model.named_parameters()}
    slope = sum((step[name] * p.grad).sum().item() for name, p in before.items() if p.grad is not None)
    assert c == pytest.approx(slope, rel=0.02)
    assert logged(trainer, "loss")[0] == pytest.approx(value.item(), rel=2e-3)


def test_the_best_weights_and_their_evaluation_are_those_of_the_checkpoint(tmp_path: Path, encoder: str) -> None:
    every = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = trainer_of(embedder(encoder), tmp_path, losses.MultipleNegativesRankingLoss, **every, **best)
    trainer.train()
    saved = SentenceTransformer(trainer.state.best_model_checkpoint, device="cpu")
    assert_same_bits(weights_of(trainer.model), weights_of(saved))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-5)


def test_a_loss_with_weights_of_its_own_is_refused_by_their_name(tmp_path: Path, encoder: str) -> None:
    with pytest.raises(ValueError, match=r"trains loss\.logit_scale, which is not a parameter of the model"):
        trainer_of(embedder(encoder), tmp_path, losses.ContrastiveTensionLossInBatchNegatives).train()
