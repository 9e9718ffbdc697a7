"""What a plan promises whatever the model: counts, order, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given as over
from hypothesis import strategies as st
from transformers import AutoConfig, BertConfig, LlamaConfig, MixtralConfig, T5Config, ViTConfig

from zo_hf.memory import Assumptions, Plan, parse_size, plan
from zo_hf.memory.model import load_config
from zo_hf.memory.quantized import weight_bytes
from zo_hf.memory.setups import SETUPS, Setup, _trace, footprints
from zo_hf.memory.trace import MemoryTrace, without_values

LLAMA_3_8B = Path(__file__).parent / "configs" / "llama-3-8b.json"
TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=500,
)
SMALL_BATCH = Assumptions(batch_size=2, sequence_length=32, rows_per_direction=0, overhead=0)
SOME = [Setup("low_rank", "half"), Setup("full", "half"), Setup("adapter", "half"), Setup("LoRA", "half")]


@over(
    st.integers(1, 10**6), st.sampled_from(["", " "]), st.sampled_from([("GB", 10**9), ("GiB", 2**30), ("mb", 10**6)])
)
def test_a_size_is_read_as_it_is_written(number: int, space: str, unit: tuple[str, int]) -> None:
    name, factor = unit
    assert parse_size(f"{number}{space}{name}") == number * factor
    assert parse_size(f" {number}.5{name} ") == round((number + 0.5) * factor)


@over(st.text(max_size=12))
def test_whatever_else_is_written_is_a_size_or_refused_by_name(text: str) -> None:
    try:
        assert parse_size(text) >= 1
    except ValueError as error:
        assert "gpu_memory=" in str(error) and "24GB" in str(error)


@pytest.mark.parametrize(
    "text", ["", "24", "GB", "-1GB", "0GB", "1e3GB", "24 GB each", "inf GB", "24XB", "9" * 400 + "GB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write a number and a unit"):
        parse_size(text)


def test_a_trace_counts_what_is_alive_and_aliases_once() -> None:
    known = torch.zeros(1000)
    with MemoryTrace([known]) as trace:
        view = known.view(10, 100)
        first = torch.zeros(100)
        second = first.view(10, 10)[0]
        del first
        assert trace.live == 400, "the view keeps it"
        third = torch.zeros(50)
        del second, view
        assert (trace.live, trace.peak) == (200, 600)
        trace.end_phase()
        del third
    assert (trace.live, trace.peak, trace.phases) == (0, 200, [600])


def test_without_values_nothing_is_allocated() -> None:
    before = psutil.Process().memory_info().rss
    with without_values(), MemoryTrace() as trace:
        large = torch.ones(10**12)
    assert trace.live == 4 * 10**12 == large.numel() * 4
    assert psutil.Process().memory_info().rss - before < 10**8


@over(st.integers(1, 64), st.integers(2, 512))
def test_assumptions_accept_every_batch(rows: int, length: int) -> None:
    assert Assumptions(batch_size=rows, sequence_length=length).probes == 2


@cache
def planned(**change: Any) -> Plan:
    base = replace(SMALL_BATCH, labels=4, rank=2, batch_size=16, sequence_length=128)
    return plan(TINY, "1GB", replace(base, **change), SOME)


@pytest.mark.parametrize(
    ("change", "grows"),
    [
        ({"batch_size": 32}, {"low_rank", "full", "adapter", "LoRA"}),
        ({"sequence_length": 256}, {"low_rank", "full", "adapter", "LoRA"}),
        ({"labels": None}, {"low_rank", "full", "adapter"}),
        ({"rank": 16}, {"low_rank"}),
        ({"lora_rank": 32}, {"adapter", "LoRA"}),
        ({"lora_targets": ("all-linear",)}, {"adapter", "LoRA"}),
        ({"optimizer": "adamw"}, {"low_rank", "adapter"}),
        ({"num_directions": 4}, {"low_rank", "full", "adapter"}),
        ({"overhead": 10**9}, {"low_rank", "full", "adapter", "LoRA"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_more_of_anything_takes_more_memory(change: dict, grows: set[str]) -> None:
    before, after = planned(), planned(**change)
    for old, new in zip(before.rows, after.rows, strict=True):
        assert new.total >= old.total
        assert (new.total > old.total or new.state > old.state) == (old.setup.kind in grows), old.setup
        assert new.headroom == after.gpu_memory - new.total and new.fits == (new.total <= 10**9)


def test_the_order_of_the_ways() -> None:
    shown = {"low_rank", "low_rank, folding", "adapter", "full", "LoRA", "AdamW"}
    rows = plan(TINY, "1GB", SMALL_BATCH, [setup for setup in SETUPS if setup.kind in shown])
    for kind in ("low_rank", "adapter"):
        half, int8, nf4 = (rows.row(kind, base) for base in ("half", "int8", "nf4"))
        assert half.weights > int8.weights > nf4.weights
        assert half.moves >= int8.moves == nf4.moves, "factors over a quantized model are those of linear layers"
    assert rows.row("low_rank, folding", "int8").moves == rows.row("low_rank", "half").moves
    assert rows.row("full").moves == sum(p.numel() for p in _model(TINY).parameters())
    assert rows.row("LoRA").working > rows.row("LoRA", checkpointing=True).working > rows.row("adapter").working
    assert rows.row("AdamW", "float32").state >= 12 * rows.row("full").moves


def test_a_fold_of_codes_reads_text_and_has_logits_of_all_its_tokens() -> None:
    vocabulary, tokens = 20_000, 16 * 32
    config = LlamaConfig(**{**TINY.to_dict(), "vocab_size": vocabulary})
    small = Assumptions(batch_size=1, sequence_length=4, rows_per_direction=0, overhead=0)
    rows = plan(config, "1GB", small, [Setup("low_rank", "int8"), Setup("low_rank, folding", "int8")])
    logits = 2 * tokens * vocabulary
    assert rows.row("low_rank", "int8").working < logits < rows.row("low_rank, folding", "int8").working < 1.5 * logits


def test_quantized_weights_are_those_of_bitsandbytes() -> None:
    linear = sum(
        p.numel()
        for name, p in _model(TINY).named_parameters()
        if p.ndim == 2 and "embed" not in name and "head" not in name
    )
    rows = plan(TINY, "1GB", SMALL_BATCH, [Setup("inference", base) for base in ("half", "int8", "nf4")])
    half, int8, nf4 = (row.weights for row in rows.rows)
    features_out = 2 * (64 + 32 + 32 + 64 + 160 + 160 + 64)
    assert half - int8 == linear - 4 * features_out
    assert half - nf4 == 2 * linear - linear // 2 - 4 * linear // 64


def test_double_quantization_takes_less_and_four_bits_less_than_eight() -> None:
    sizes = [weight_bytes(4096 * 4096, 4096, base) for base in ("int8", "nf4", "nf4 double")]
    assert sizes == sorted(sizes, reverse=True)
    bits = [8 * size / 4096**2 for size in sizes]
    assert bits == pytest.approx([8.0, 4.5, 4.127], abs=0.01), "QLoRA's paper: 0.5 and 0.127 bits for the scales"


@pytest.mark.slow
def test_two_short_models_stand_for_a_deep_one() -> None:
    deep = LlamaConfig(**{**TINY.to_dict(), "num_hidden_layers": 9})
    setups = [Setup("low_rank", "half"), Setup("full", "half"), Setup("scales", "nf4"), Setup("adapter", "half")]
    setups += [
        Setup("inference", "half"),
        Setup("LoRA", "half"),
        Setup("LoRA", "half", True),
        Setup("AdamW", "float32"),
    ]
    whole, cut = _trace(deep, SMALL_BATCH, setups), footprints(deep, SMALL_BATCH, setups)
    for setup in setups:
        usage = whole[(setup.kind, setup.base, setup.checkpointing)]
        assert cut[setup].moves == usage.moves
        assert cut[setup].state + cut[setup].working >= usage.state
        optimizer = 8 * usage.moves if setup.needs_backward else 0
        assert cut[setup].state + cut[setup].working - optimizer == pytest.approx(max(usage.phases), rel=0.01), setup


@pytest.mark.slow
def test_a_70b_model_is_planned_in_few_operations_and_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    operations, dispatch = 0, MemoryTrace.__torch_dispatch__

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal operations
        operations += 1
        return dispatch(*args, **kwargs)

    monkeypatch.setattr(MemoryTrace, "__torch_dispatch__", counted)
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    before = psutil.Process().memory_info().rss
    result = plan(config, "80GB")
    assert 0 < operations < 220_000, "about 0.2 ms each, and not one more for more layers"
    assert psutil.Process().memory_info().rss - before < 5e8
    assert result.row("full").moves == 70_553_706_496
    assert not result.row("low_rank").fits and result.row("low_rank", "nf4 double").fits


def test_a_config_can_be_a_file_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(LLAMA_3_8B.read_text())
    assert load_config(str(tmp_path)).hidden_size == load_config(str(LLAMA_3_8B)).hidden_size == 4096


def test_what_cannot_be_planned_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model='nobody/nothing' has no readable config"):
        load_config("nobody/nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(ValueError, match=r"has no readable config"):
        load_config(str(tmp_path))
    for config, reason in (
        (BertConfig(), "an encoder;"),
        (T5Config(), "encoder-decoder"),
        (ViTConfig(), "does not support"),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            plan(config, "24GB")
        assert "model=" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="sequence_length=4096 exceeds the model's 2048"):
        plan(TINY, "24GB", Assumptions(sequence_length=4096))
    with pytest.raises(ValueError, match=r"lora_targets=.*cannot be adapted"):
        plan(TINY, "24GB", Assumptions(lora_targets=("nothing",)), [Setup("adapter", "half")])
    experts = MixtralConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with pytest.raises(ValueError, match=r"model='mixtral' cannot be planned, because .*; use a dense model"):
        plan(experts, "24GB", SMALL_BATCH)
    with pytest.raises(ValueError, match="gpu_memory="):
        plan(TINY, "24")


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"batched": "always"},
        {"sequence_length": 1},
        {"labels": 512},
        {"labels": 0},
        {"dtype": "float32"},
        {"attention": "flash"},
        {"rank": 0},
        {"num_directions": 0},
        {"direction": "sphere"},
        {"optimizer": "muon"},
        {"lora_rank": 0},
        {"overhead": -1},
    ],
    ids=lambda wrong: "-".join(map(str, next(iter(wrong.items())))),
)
def test_a_wrong_assumption_is_named(wrong: dict) -> None:
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"^{name}="):
        Assumptions(**wrong)


def test_every_way_of_the_options_is_planned() -> None:
    assert {setup.kind for setup in SETUPS} >= {
        "inference",
        "low_rank",
        "full",
        "adapter",
        "norms",
        "scales",
        "LoRA",
        "QLoRA",
    }
    assert AutoConfig.from_pretrained(LLAMA_3_8B).num_hidden_layers == 32


def _model(config: LlamaConfig) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("rows_per_direction", ["auto", 0])
def test_labels_everywhere_take_little_more_than_inference(rows_per_direction: int | str) -> None:
    """The logits of 8,192 tokens of Llama-3-8B and their losses would take 8 GB beside the 18 GB of inference."""
    given = Assumptions(batch_size=16, sequence_length=512, labels=None, rows_per_direction=rows_per_direction)
    config = AutoConfig.from_pretrained(LLAMA_3_8B)
    inference, step = plan(config, "24GB", given, [Setup("inference", "half"), Setup("low_rank", "half")]).rows
    assert step.total <= 1.05 * inference.total
