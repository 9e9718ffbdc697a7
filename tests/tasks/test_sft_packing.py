"""Packed rows do not see each other, or the model packs none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import CAUSAL_MODELS, seeded, tiny_llama
from zo_hf.tasks.packing import keeps_rows_apart


@pytest.mark.parametrize("name", CAUSAL_MODELS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_models_are_told_apart(name: str, attention: str) -> None:
    model: Any = seeded(CAUSAL_MODELS[name], attn_implementation=attention)
    assert keeps_rows_apart(model) == (name != "opt"), "OPT makes a mask of all ones"


def test_half_precision_and_a_model_without_positions() -> None:
    model: Any = seeded(tiny_llama, torch.bfloat16)
    assert keeps_rows_apart(model)
    model.forward = lambda input_ids: None
    assert not keeps_rows_apart(model)
