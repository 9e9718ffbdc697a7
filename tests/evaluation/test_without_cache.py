"""Probes fill no key-value cache, whatever the config asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import causal_batch, seeded, tiny_llama
from zo_hf import ZerothOrder


@pytest.mark.parametrize("wrapped", [False, True])
def test_probes_fill_no_cache(wrapped: bool) -> None:
    model = seeded(tiny_llama)
    outer: Any = nn.Sequential(model) if wrapped else model
    caches = []

    def loss() -> torch.Tensor:
        outputs = model(**causal_batch())
        caches.append(outputs.past_key_values)
        return outputs.loss

    assert model.config.use_cache is True
    zo = ZerothOrder(outer)
    zo.estimate(loss)
    assert caches and set(caches) == {None}
    assert model.config.use_cache is True
    loss()
    assert caches[-1] is not None


def test_the_config_is_as_before_after_an_exception() -> None:
    model = seeded(tiny_llama)
    zo = ZerothOrder(model, rows_per_direction=0)

    def fails() -> torch.Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        zo.estimate(fails)
    assert model.config.use_cache is True
