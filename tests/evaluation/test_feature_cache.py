"""The cache of features gives the losses of whole forward passes, and runs the layers in front once for every row."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import (
    CAUSAL_MODELS,
    TinyTask,
    assert_same_bits,
    seeded,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tiny_t5,
    weights_of,
)
from tests.trainer.runs import SaveAt, logged, make_trainer, trained, with_lora
from zo_hf.evaluation.feature_cache import FeatureCache

LAYERS = 4
#: Matrices of the last layer, in the names of all architectures.
LAST = {"zo_target_modules": r".*[.](layers|layer|h)[.]3[.].*", "zo_fold_steps": 3, "max_steps": 6}
CACHED = LAST | {"zo_feature_cache_gib": 0.1}


def deep(build: Any, **options: Any) -> nn.Module:
    return seeded(build, **{"n_layer" if build is tiny_gpt2 else "num_hidden_layers": LAYERS} | options)


class Padded(TinyTask):
    """Rows of several lengths, padded on one side."""

    def __init__(self, side: str) -> None:
        super().__init__(16)
        self.side = side

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row, padding = super().__getitem__(index), index % 3
        if not padding:
            return row
        fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        at = (padding, 0) if self.side == "left" else (0, padding)
        return {
            name: nn.functional.pad(value[: len(value) - padding], at, value=fills[name])
            for name, value in row.items()
        } | {"labels": nn.functional.pad(row["labels"][padding:], at, value=-100)}


class Sentences(TinyTask):
    """The rows of `TinyTask` with a class each."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        return row | {"labels": torch.tensor(index % 2), "token_type_ids": row["input_ids"] % 2}


RUNS: dict[str, dict[str, Any]] = {
    "one direction": {"zo_rows_per_direction": 0},
    "one probe at a time": {"zo_rows_per_direction": 0, "zo_batched_probes": False},
    "by rows": {"zo_rows_per_direction": 1},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "derivatives": {"zo_estimator": "forward_gradient"},
    "several directions": {"zo_rows_per_direction": 0, "zo_num_directions": 3},
    "full": {"zo_subspace": "full", "learning_rate": 1e-3},
    "curvature": {"zo_estimator": "second_difference", "zo_rule": "curvature", "learning_rate": 1e-3},
}


def compare(tmp_path: Path, build: Any, **options: Any) -> None:
    """Train with and without the cache; losses and weights agree to rounding."""
    whole = trained(tmp_path / "whole", build(), **LAST | options)
    cached = trained(tmp_path / "cached", build(), **CACHED | options)
    assert logged(cached, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)
    expected = weights_of(whole.model)
    for name, weight in weights_of(cached.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_losses_are_those_of_whole_forward_passes(tmp_path: Path, name: str) -> None:
    compare(tmp_path, lambda: deep(CAUSAL_MODELS[name]))


@pytest.mark.parametrize("run", RUNS)
def test_every_way_to_evaluate_takes_features(tmp_path: Path, run: str) -> None:
    compare(tmp_path, lambda: deep(tiny_llama, attn_implementation="eager"), **RUNS[run])


def test_a_classifier_and_an_adapter_take_features(tmp_path: Path) -> None:
    more = {"train_dataset": Sentences(), "eval_dataset": None}
    compare(tmp_path / "bert", lambda: deep(tiny_bert), more=more)
    adapter = {"zo_target_modules": None, "zo_fold_steps": None}
    compare(
        tmp_path / "lora",
        lambda: with_lora(deep(tiny_llama), target_modules=["q_proj", "up_proj"], layers_to_transform=[3]),
        **adapter,
    )


@pytest.mark.parametrize(
    ("build", "side"), [(tiny_llama, "left"), (tiny_llama, "right"), (tiny_opt, "left"), (tiny_gpt2, "right")]
)
def test_padding_is_left_out(tmp_path: Path, build: Any, side: str) -> None:
    compare(tmp_path, lambda: deep(build), more={"train_dataset": Padded(side)})


def test_the_layers_in_front_run_once_for_every_row(tmp_path: Path) -> None:
    """Three epochs of 16 rows: each row alone, and the first pass, which is compared."""
    model = deep(tiny_llama)
    rows = dict.fromkeys(range(LAYERS), 0)

    def count(place: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            rows[place] += len(output)

        return hook

    for place, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(count(place))
    options = CACHED | {"zo_rows_per_direction": 0, "zo_batched_probes": False}
    run = trained(tmp_path, model, more={"train_dataset": TinyTask(16)}, **options)
    assert [rows[place] for place in range(LAYERS - 1)] == [16 + 8] * (LAYERS - 1)
    assert rows[LAYERS - 1] == 8 * logged(run, "zo/forward_passes")[-1]
    run_part = (3 * (16 + 8) + rows[3]) / (LAYERS * rows[3])
    assert logged(run, "zo/layers_run")[-1] == pytest.approx(run_part)


def test_features_do_not_depend_on_their_batch() -> None:
    """Bits, in batches of other rows, other lengths and other sizes."""
    model = deep(tiny_llama)
    rows = [TinyTask()[index] for index in range(8)]

    def kept(*batches: list[int]) -> dict[bytes, torch.Tensor]:
        cache = FeatureCache(model, [model.model.layers[3].mlp.up_proj], 0.1)
        with cache.serving(), torch.no_grad():
            for batch in batches:
                ids = torch.stack([rows[i]["input_ids"] for i in batch])
                pad = torch.zeros(len(ids), len(batch), dtype=torch.long)
                mask = torch.cat([pad, torch.ones_like(ids)], 1)
                model(input_ids=torch.cat([pad, ids], 1), attention_mask=mask)
        return cache._kept

    assert_same_bits(kept([0, 1, 2, 3, 4, 5, 6, 7]), kept([0], [2, 1], [3, 5, 4], [7, 6]))


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    options = CACHED | {"max_steps": 9}
    whole = trained(tmp_path / "run", deep(tiny_llama), more={"callbacks": [SaveAt(5)]}, **options)
    resumed = trained(tmp_path / "run", deep(tiny_llama), resume=str(tmp_path / "run" / "checkpoint-5"), **options)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))


def test_a_full_memory_costs_time_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gib = 5 * (12 * 32 * 4 + len("input_ids") + 12 * 8) / 2**30  # of five rows
    with caplog.at_level(logging.WARNING, "zo_hf"):
        compare(tmp_path, lambda: deep(tiny_llama), zo_feature_cache_gib=gib)
    assert "zo_feature_cache_gib is used up by the features of 5 rows" in caplog.text


def test_after_training_the_model_is_whole(tmp_path: Path) -> None:
    run = trained(tmp_path, deep(tiny_llama), **CACHED)
    assert all("forward" not in layer.__dict__ for layer in run.model.model.layers)
    assert not run.model.model._forward_pre_hooks
    assert run._features is None


REFUSED = {
    "the first layer of LlamaForCausalLM moves": (tiny_llama, {"zo_target_modules": ".*layers.*"}),
    "an encoder and a decoder": (tiny_t5, {"zo_target_modules": None}),
    "embed_tokens in front of them moves": (tiny_opt, {"zo_target_modules": r".*(layers[.]3|embed_tokens).*"}),
    "zo_feature_cache_gib=0.1 does not combine with torch_compile=True": (tiny_opt, {"torch_compile": True}),
    "zo_feature_cache_gib=-1": (tiny_opt, {"zo_feature_cache_gib": -1}),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_work_is_refused(tmp_path: Path, sentence: str) -> None:
    build, options = REFUSED[sentence]
    model = seeded(tiny_t5) if build is tiny_t5 else deep(build)
    with pytest.raises(ValueError, match=sentence.replace("(", "[(]")):
        make_trainer(tmp_path, model, **CACHED | options).train()


def test_features_that_depend_on_the_batch_are_refused(tmp_path: Path) -> None:
    """GPT-2 counts positions from the padding on its left, unless it gets them."""
    with pytest.raises(ValueError, match="a row's features differ by"):
        trained(tmp_path, deep(tiny_gpt2), more={"train_dataset": Padded("left")}, **CACHED)


def test_inputs_that_carry_more_than_tokens_are_refused() -> None:
    model = deep(tiny_llama)
    cache = FeatureCache(model, [model.model.layers[3].mlp], 0.1)
    with cache.serving(), pytest.raises(ValueError, match="the model also gets inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 4, 32))


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions", "is_causal"])
def test_flags_that_change_what_the_layers_in_front_give_are_refused(flag: str) -> None:
    model = deep(tiny_llama, attn_implementation="eager")
    cache, ids = FeatureCache(model, [model.model.layers[3].mlp], 0.1), TinyTask()[0]["input_ids"][None]
    with cache.serving(), torch.no_grad():
        model(input_ids=ids, use_cache=False, output_hidden_states=False)
        with pytest.raises(ValueError, match=f"zo_feature_cache_gib .*{flag}"):
            model(input_ids=ids, **{flag: flag != "is_causal"})


def test_padding_between_tokens_needs_positions() -> None:
    """A row alone is without it, and then has other positions, even if batches without padding have been compared."""
    model = deep(tiny_llama)
    cache, ids = FeatureCache(model, [model.model.layers[3].mlp], 0.1), TinyTask()[0]["input_ids"][None]
    mask = torch.ones_like(ids)
    with cache.serving(), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        mask[0, 4:6] = 0
        with pytest.raises(ValueError, match="between tokens would change their positions"):
            model(input_ids=ids, attention_mask=mask)
        model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(12)[None])
        with pytest.raises(ValueError, match="needs a token in every batch"):
            model(input_ids=ids, attention_mask=torch.zeros_like(ids))


def test_positions_belong_to_a_row_with_them() -> None:
    """The bytes of ids and positions are those of a longer row's ids."""
    model = deep(tiny_llama)
    cache, ids = FeatureCache(model, [model.model.layers[3].mlp], 0.1), torch.tensor([[5, 7, 0, 1]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with cache.serving():
            model(input_ids=ids[:, :2], position_ids=ids[:, 2:])
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
        with cache.serving(), pytest.raises(ValueError, match="the model also gets position_ids"):
            model(input_ids=ids, position_ids=torch.zeros(3, 1, 4, dtype=torch.long))
