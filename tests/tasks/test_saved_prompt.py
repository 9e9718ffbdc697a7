"""`prompt.json` with any content is refused in one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trajectory.hostile import VALUES
from zo_hf.tasks.prompts import PROMPT_A
from zo_hf.tasks.saved_prompt import FILE_NAME, load_prompt, load_quantization, save_prompt

PROMPT: dict[str, Any] = {
    "template": "{text} It was",
    "verbalizers": [" terrible", " great"],
    "label_prior": [-0.5, -1.0],
    "quantization": None,
}


def refusal(folder: Path, content: bytes) -> str | None:
    (folder / FILE_NAME).write_bytes(content)
    try:
        load_prompt(folder)
        load_quantization(folder)
    except ValueError as error:
        message = str(error)
        assert message.endswith(".") and message.isprintable() and message.count(". ") == 0 and FILE_NAME in message
        return message
    return None


def test_what_training_writes_is_read(tmp_path: Path) -> None:
    prior = torch.tensor([0.25, 0.75]).log()
    for quantization in (None, {"quant_method": "bitsandbytes", "load_in_8bit": True}):
        save_prompt(tmp_path, PROMPT_A, prior, quantization)
        prompt, loaded = load_prompt(tmp_path)
        assert prompt == PROMPT_A and load_quantization(tmp_path) == quantization
        torch.testing.assert_close(loaded, prior)


@pytest.mark.parametrize("name", PROMPT)
def test_any_value_of_a_field(tmp_path: Path, name: str) -> None:
    refused = 0
    for text in VALUES:
        hostile = json.dumps(PROMPT | {name: "\0here"}).replace('"\\u0000here"', text)
        refused += refusal(tmp_path, hostile.encode("utf-8", "surrogatepass")) is not None
    assert refused >= len(VALUES) - 2
    without = {key: value for key, value in PROMPT.items() if key != name}
    assert (refusal(tmp_path, json.dumps(without).encode()) is None) == (name == "quantization")


@pytest.mark.parametrize(
    "change",
    [
        {"label_prior": [0.0, 0.0, 0.0]},
        {"label_prior": [True, False]},
        {"verbalizers": ["a", "a"]},
        {"verbalizers": ["a"], "label_prior": [0.0]},
        {"template": "{text}{text}"},
        {"quantization": {"quant_method": "bitsandbytes", "module": "os"}},
    ],
    ids=str,
)
def test_values_that_do_not_belong_together(tmp_path: Path, change: dict[str, Any]) -> None:
    assert refusal(tmp_path, json.dumps(PROMPT | change).encode())


@pytest.mark.skipif(os.name != "posix", reason="has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE_NAME)
    with pytest.raises(ValueError, match=FILE_NAME):
        load_prompt(tmp_path)
