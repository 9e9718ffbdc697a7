from typing import Any

import pytest
import torch

from tests.tasks.conftest import model, model_folder, tokenizer
from zo_hf.comparison import subject

__all__ = ["losses", "model", "model_folder", "tokenizer"]


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each loss that training computed, whoever counts it."""
    computed: list[int] = []
    original = subject.LabelWordLoss.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        computed.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(subject.LabelWordLoss, "__call__", counted)
    return computed
