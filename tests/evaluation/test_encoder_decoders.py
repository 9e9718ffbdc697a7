"""Encoder-decoders: their loss in one batch and by rows, position biases for every row, counts of labels, and training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BartForSequenceClassification,
    PreTrainedModel,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
)

from tests.conftest import (
    VOCABULARY,
    TinyTask,
    assert_same_bits,
    seeded,
    tiny_bart,
    tiny_t5,
    translation_batch,
    weights_of,
)
from tests.evaluation.test_rows import EPS, numbers_of_rows_alone
from tests.subspaces.helpers import loss_of, move_off_the_origin, prepared, sgd
from tests.trainer.runs import InOrder, SaveAt, logged, make_trainer
from zo_hf import ZOSeq2SeqTrainer
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import NotBatchable, Probe
from zo_hf.evaluation.model_loss import ModelLoss
from zo_hf.trajectory import read_trajectory, replay

ROWS = 6
SIZE = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
SIZE |= {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
SIZE |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SIZE |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "init_std": 0.1}


def named(name: str, **options: Any) -> PreTrainedModel:
    kind = getattr(transformers, name)
    return kind(kind.config_class(**SIZE | options))


def t5gemma() -> PreTrainedModel:
    """An encoder-decoder that divides its loss by the count of labels that it gets."""
    size = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1}
    config = T5GemmaModuleConfig(**size)
    return T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=config, decoder=config, vocab_size=VOCABULARY))


def spectrograms() -> dict[str, Tensor]:
    sound = torch.randn(ROWS, 8, 40, generator=torch.Generator().manual_seed(0))
    return {"input_features": sound, "labels": translation_batch(ROWS)["labels"]}


WHISPER = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 16}
MODELS: dict[str, Any] = {
    "t5": tiny_t5,
    "umt5": partial(named, "UMT5ForConditionalGeneration"),
    "longt5": partial(named, "LongT5ForConditionalGeneration", local_radius=3),
    "bart": tiny_bart,
    "mbart": partial(named, "MBartForConditionalGeneration"),
    "marian": partial(named, "MarianMTModel"),
    "pegasus": partial(named, "PegasusForConditionalGeneration"),
    "whisper": partial(named, "WhisperForConditionalGeneration", **WHISPER),
    "t5gemma": t5gemma,
}


def batch_of(name: str) -> dict[str, Tensor]:
    return spectrograms() if name == "whisper" else translation_batch(ROWS)


@pytest.mark.parametrize("subspace", ["low_rank", "norms", "adapter"])
@pytest.mark.parametrize("name", MODELS)
def test_every_row_has_its_own_number(name: str, subspace: str) -> None:
    model, batch = prepared(subspace, seeded(MODELS[name])), batch_of(name)
    zo = ZerothOrder(model, subspace, eps=EPS, seed=0, rows_per_direction=1)
    found = zo.estimate(loss_of(model, batch)).projected_gradients
    assert found == pytest.approx(numbers_of_rows_alone(zo, batch, ROWS), abs=2e-6 / EPS)


@pytest.mark.parametrize("subspace", ["low_rank", "core", "full", "norms", "adapter"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_probes_in_one_batch_have_the_losses_of_sequential_ones(name: str, subspace: str) -> None:
    model = prepared(subspace, seeded(MODELS[name], torch.float64))
    zo = ZerothOrder(model, subspace, num_directions=3, eps=0.02)
    move_off_the_origin(zo.subspace)
    found = []
    for batched in (False, True):
        zo.evaluator.batched = batched
        found.append(zo.probe(loss_of(model, batch_of(name))))
        zo.discard()
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-6)
    assert (found[0][::2] - found[0][1::2]).abs().min() > 1e-5


@pytest.mark.parametrize("name", ["t5", "marian"])
def test_a_rows_number_is_the_slope_of_its_loss_along_its_direction(name: str) -> None:
    model, batch = seeded(MODELS[name]), batch_of(name)
    zo = ZerothOrder(model, "norms", eps=1e-3, seed=0, rows_per_direction=1)
    sgd(zo, 0.0)
    found = zo.estimate(loss_of(model, batch)).projected_gradients
    assert zo.subspace.coordinate_blocks is not None
    (block,) = zo.subspace.coordinate_blocks
    with zo.subspace.differentiable() as leaves:
        logits = model(**batch).logits
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").sum(1)
        losses = losses / (batch["labels"] != -100).sum()
        for row, number in enumerate(found):
            parts = torch.autograd.grad(losses[row], leaves, retain_graph=True)
            slopes = block.layout.join(dict(zip(zo.subspace.coordinates, parts, strict=True)))
            direction = block.direction(zo._stream(row), zo.distribution)
            assert number == pytest.approx((slopes @ direction).item(), abs=2e-3)


# The table of T5's position biases, which no dimension of its inputs repeats for the rows.


def test_a_bias_for_every_group_is_that_of_its_own_table() -> None:
    model = seeded(tiny_t5)
    zo = ZerothOrder(model, "low_rank", rank=1, seed=0, target_modules=["relative_attention_bias"])
    attention: Any = model.encoder.block[0].layer[0].SelfAttention
    probes = [Probe(group, 1.0) for group in range(3)]
    with torch.no_grad():
        with zo.subspace.at(probes, zo._stream, zo.distribution, rows=2):
            found = attention.compute_bias(5, 7)
        alone = []
        for probe in probes:
            with zo.subspace.at((probe,), zo._stream, zo.distribution):
                alone.append(attention.compute_bias(5, 7))
    assert found.shape == (6, 2, 5, 7)
    torch.testing.assert_close(found, torch.cat(alone).repeat_interleave(2, 0), rtol=0, atol=0)
    assert not torch.equal(alone[0], alone[1])
    zo.finish()
    assert "compute_bias" not in vars(attention)


# Counts of labels.


class CountedT5(T5ForConditionalGeneration):
    """Divides by the count of labels, as its name does not say."""

    def forward(self, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if num_items_in_batch is not None:
            outputs.loss = outputs.loss * kwargs["labels"].ne(-100).sum() / num_items_in_batch
        return outputs


def counted(model: Any, batch: dict[str, Tensor], count: int) -> ModelLoss:
    return ModelLoss(
        model, model, batch, lambda i: model(**i, num_items_in_batch=count).loss, num_items_in_batch=count
    )


@pytest.mark.parametrize("name", ["t5", "t5gemma"])
def test_a_count_divides_the_loss_of_the_models_that_divide_by_it(name: str) -> None:
    model, batch = seeded(MODELS[name]), batch_of(name)
    with torch.no_grad():
        expected = model(**batch, num_items_in_batch=50).loss
        assert counted(model, batch, 50)().item() == expected.item()
        torch.testing.assert_close(counted(model, batch, 50).by_groups(3).sum(), expected)
        torch.testing.assert_close(counted(model, batch, 50).batched(2), expected.repeat(2))


def test_a_model_that_divides_by_the_count_unexpectedly_is_not_believed() -> None:
    model, batch = seeded(lambda: CountedT5(tiny_t5().config)), translation_batch(ROWS)
    with torch.no_grad():
        for function, number in (("by_groups", 3), ("batched", 2)):
            with pytest.raises(NotBatchable, match="terms of its own"):
                getattr(counted(model, batch, 50), function)(number)


def test_a_router_that_adds_to_the_loss_keeps_one_direction() -> None:
    router = {"num_sparse_encoder_layers": 1, "num_experts": 2, "router_aux_loss_coef": 0.1}
    model = seeded(partial(named, "SwitchTransformersForConditionalGeneration"), **router)
    model.config.output_router_logits = True
    batch = translation_batch(ROWS) | {"output_router_logits": True}
    zo = ZerothOrder(model, "low_rank", seed=0, rows_per_direction=1)
    estimate = zo.estimate(loss_of(model, batch))
    assert len(estimate.projected_gradients) == 1
    with torch.no_grad():
        assert estimate.loss == pytest.approx(model(**batch).loss.item(), rel=1e-3)


# Other losses and dtypes.


def test_an_encoder_decoder_that_classifies_comes_apart() -> None:
    config = tiny_bart().config
    config.num_labels = 3
    model = seeded(lambda: BartForSequenceClassification(config))
    batch = translation_batch(ROWS) | {"labels": torch.arange(ROWS) % 3}
    batch["input_ids"][:, -1] = config.eos_token_id
    batch["input_ids"][:, :-1].clamp_(min=3)
    zo = ZerothOrder(model, "low_rank", eps=EPS, seed=0, rows_per_direction=1)
    found = zo.estimate(loss_of(model, batch)).projected_gradients
    assert found == pytest.approx(numbers_of_rows_alone(zo, batch, ROWS), abs=2e-6 / EPS)


def test_half_precision_losses_of_one_probe_are_summed_in_float32() -> None:
    """The first evaluation, which compares, and those after it."""
    model, batch = seeded(tiny_t5, torch.bfloat16), translation_batch(ROWS)
    with torch.no_grad():
        loss = loss_of(model, batch)
        expected = nn.functional.cross_entropy(model(**batch).logits.float().flatten(0, 1), batch["labels"].flatten())
        assert [loss().item(), loss().item()] == pytest.approx([expected.item()] * 2, rel=1e-6)


@pytest.mark.parametrize("function", ["by_groups", "batched"])
def test_half_precision_losses_are_summed_in_float32(function: str) -> None:
    model, batch = seeded(tiny_t5, torch.bfloat16), translation_batch(ROWS)
    with torch.no_grad():
        losses = getattr(loss_of(model, batch), function)(2)
        expected = nn.functional.cross_entropy(model(**batch).logits.float().flatten(0, 1), batch["labels"].flatten())
    found = losses.sum() if function == "by_groups" else losses[0]
    assert losses.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5 if function == "by_groups" else 1e-2)


# Training.


class Sentences(TinyTask):
    """Sentences with one to four labels."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        token = row["labels"][-1]
        labels = torch.full((4,), -100)
        labels[: 1 + index % 4] = token
        decoder = torch.cat([torch.zeros(1, dtype=torch.long), labels[:-1].clamp(min=0)])
        return row | {"labels": labels, "decoder_input_ids": decoder}


class Seq2SeqInOrder(ZOSeq2SeqTrainer, InOrder):
    """Takes rows in order."""


def seq2seq(folder: Path, **options: Any) -> ZOSeq2SeqTrainer:
    more = {"train_dataset": Sentences(), "eval_dataset": Sentences(16), **options.pop("more", {})}
    defaults = {"zo_rank": 2, "zo_fold_steps": 2, "zo_eps": 1e-2, "max_steps": 3, "per_device_train_batch_size": 8}
    return make_trainer(folder, seeded(tiny_t5), Seq2SeqInOrder, more, **defaults | options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_micro_batches_give_the_same_steps(tmp_path: Path, smoothing: float) -> None:
    found = []
    for rows, micro_batches in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches}
        trainer = seq2seq(tmp_path / str(rows), label_smoothing_factor=smoothing, **options)
        trainer.train()
        assert [len(r.projected_gradients) for r in read_trajectory(tmp_path / str(rows)).records] == [8] * 3
        found.append(logged(trainer, "zo/projected_grad") + logged(trainer, "loss"))
    assert found[0] == pytest.approx(found[1], rel=1e-2, abs=1e-3)


def test_resume_and_replay_have_the_same_bits(tmp_path: Path) -> None:
    whole = seq2seq(tmp_path, more={"callbacks": [SaveAt(2)]})
    whole.train()
    assert_same_bits(weights_of(replay(seeded(tiny_t5), tmp_path)), weights_of(whole.model))
    resumed = seq2seq(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
