"""Configurations of adapters, of which PEFT gets known fields only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.subspaces.peft.methods import Method, every_method
from zo_hf.subspaces.adapter_config import FILE, read_adapter_config

LORA = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2}
ONLY_DESCRIBE = ("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "runtime_config")


def plain(config: Any) -> dict[str, Any]:
    content = {name: value for name, value in config.to_dict().items() if name not in ONLY_DESCRIBE}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in content.items()}


@every_method()
def test_what_peft_writes_is_read(tmp_path: Path, method: Method) -> None:
    config = method.model().peft_config["default"]
    config.save_pretrained(str(tmp_path))
    assert plain(read_adapter_config(tmp_path)) == plain(config)


@pytest.mark.parametrize(
    "content",
    [
        LORA | {"megatron_config": {}, "megatron_core": "canary"},
        LORA | {"megatron_core": "canary"},
        LORA | {"custom_model": "canary"},
        LORA | {"init_lora_weights": "corda", "corda_config": {"cache_file": "canary"}},
        LORA | {"loftq_config": {"loftq_bits": 4}},
        LORA | {"arrow_config": {"x": 1}},
        LORA | {"layer_replication": [[0, 1]]},
        LORA | {"target_modules": "((a*)*)*b"},
        LORA | {"target_modules": "(a|b"},
        LORA | {"rank_pattern": {"(.*)*x": 1}},
        LORA | {"r": 1 << 40},
        LORA | {"r": "2"},
        LORA | {"use_dora": 1},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "prompt_tuning_init": "TEXT"},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "tokenizer_name_or_path": "canary"},
        {"peft_type": "XLORA", "adapters": {"a": "canary"}},
        {"peft_type": "NONE"},
        {"peft_type": ["LORA"]},
        {},
        [],
    ],
    ids=str,
)
def test_everything_else_is_refused_in_one_sentence(tmp_path: Path, content: Any) -> None:
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=FILE) as error:
        read_adapter_config(tmp_path)
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message and message.count(". ") == 0


@pytest.mark.parametrize("pattern", [r".*\.(q|v)_proj", r"model\.layers\.\d+\.mlp\.(up|down)_proj", "q_proj"])
def test_patterns_that_select_modules_are_read(tmp_path: Path, pattern: str) -> None:
    (tmp_path / FILE).write_text(json.dumps(LORA | {"target_modules": pattern}))
    assert read_adapter_config(tmp_path).target_modules == pattern
