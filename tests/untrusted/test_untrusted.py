"""Reading of files that somebody else may have written."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from zo_hf.untrusted import plain_json
from zo_hf.untrusted.fields import distinct, first_misfit, fits_type, is_text, list_of, maybe, one_of, shown, whole
from zo_hf.untrusted.quantization_config import loadable
from zo_hf.untrusted.tensors import read_tensors

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=50)
@given(PLAIN)
def test_what_json_writes_is_read(content: Any) -> None:
    assert plain_json.parse(json.dumps(content).encode()) == content


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(text: bytes) -> None:
    try:
        plain_json.parse(text)
    except ValueError as error:
        assert str(error).startswith("it ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[" * 100_000, "nested"),
        (b"[" * 20 + b"]" * 20, "nested"),
        (b"[" + b"[]," * plain_json.MAX_CONTAINERS + b"0]", "lists and objects"),
        (b" " * (plain_json.MAX_BYTES + 1), "bytes"),
        (b"NaN", "finite"),
        (b"1e999", "finite"),
        (b"1" * 5000, "64 bits"),
        (b"18446744073709551616", "64 bits"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"\xff", "UTF-8"),
        (b"{", "valid JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_file_of_ours_holds_is_refused_in_little_memory(text: bytes, reason: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=reason):
            plain_json.parse(text)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(text) + (1 << 20)
    finally:
        tracemalloc.stop()


def test_measurements_may_not_be_finite() -> None:
    assert plain_json.parse(b"[NaN, -Infinity, 1e999]", finite=False)[1:] == [-math.inf, math.inf]


@pytest.mark.parametrize(
    ("value", "kind", "fits"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        (True, float, False),
        (math.nan, float, False),
        ("a", str, True),
        ("\ud800", str, False),
        (None, int | None, True),
        ("auto", int | str, True),
        ([1], int | str, False),
        (1, bool, False),
        (True, bool, True),
    ],
)
def test_types_are_exact(value: Any, kind: Any, fits: bool) -> None:
    assert fits_type(value, kind) is fits


def test_a_table_names_the_first_field_that_does_not_fit() -> None:
    table = {"a": whole(1, 3), "b": maybe(list_of(is_text)), "c": one_of(1, "x"), "d": distinct(is_text)}
    good = {"a": 3, "c": 1, "d": ["x", "y"], "more": object()}
    assert first_misfit(good, table) is None
    for name, value in [("a", 4), ("a", True), ("b", [1]), ("c", True), ("d", ["x", "x"]), ("d", None)]:
        assert first_misfit(good | {name: value}, table) == name


@settings(max_examples=50)
@given(st.one_of(st.text(), PLAIN))
def test_what_a_message_shows_is_one_printable_line(value: Any) -> None:
    assert shown(value).isprintable() and len(shown(value)) < 3000


@pytest.mark.parametrize(
    ("config", "given_to_transformers"),
    [
        (None, False),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, True),
        ({"quant_method": "gptq", "bits": 4, "dataset": "c4", "tokenizer": "somebody/else"}, False),
    ],
)
def test_known_quantizations_are_loaded(config: Any, given_to_transformers: bool) -> None:
    assert loadable(config) == (config if given_to_transformers else None)


def test_transformers_own_quantization_configs_are_loaded() -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import BitsAndBytesConfig, TorchAoConfig

    for config in (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
        TorchAoConfig(Int8WeightOnlyConfig()),
    ):
        plain = json.loads(json.dumps(config.to_dict(), default=str))
        assert loadable(plain) == plain


@pytest.mark.parametrize(
    "config",
    [
        [],
        {},
        {"quant_method": 1},
        {"quant_method": "bitsandbytes", "module": "os"},
        {"quant_method": "bitsandbytes", "load_in_4bit": "yes"},
        {"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "load"},
        {"quant_method": "bitsandbytes", "llm_int8_threshold": math.inf},
        {"quant_method": "torchao", "quant_type": "int4"},
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "os.system", "_data": {"a": 1}}}},
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "PerRow", "_data": {"a": {"_type": "eval"}}}}},
    ],
)
def test_other_quantizations_are_refused(config: Any) -> None:
    with pytest.raises(ValueError, match="its quantization"):
        loadable(config)


def test_tensors_are_compared_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(1)}, path)
    assert set(read_tensors(path)) == {"a", "b"}
    assert set(read_tensors(path, {"a": torch.Size((2, 3))})) == {"a"}
    with pytest.raises(ValueError, match="it lacks c"):
        read_tensors(path, {"c": torch.Size((1,))})
    with pytest.raises(ValueError, match="a has the shape"):
        read_tensors(path, {"a": torch.Size((3, 2))})
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="cannot be read"):
        read_tensors(path)
