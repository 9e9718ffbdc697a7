"""What blocks of code in the documentation use without defining it: small enough for a test, and the same every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.conftest import TinyTask, seeded, tiny_bert, tiny_opt
from tests.rewards.runs import prompts, tokenizer


def network() -> nn.Module:
    """A few hundred weights, one layer of them with a norm."""
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 1))


def inputs() -> torch.Tensor:
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def labeled_rows() -> list[dict[str, Any]]:
    """Rows of a task of two classes."""
    ids = torch.randint(1, 64, (32, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": index % 2} for index, row in enumerate(ids)]


GIVEN: dict[str, Callable[[], Any]] = {
    "model": lambda: seeded(tiny_opt),  # a causal language model
    "base": lambda: seeded(tiny_opt),  # the same once more
    "train_dataset": TinyTask,
    "eval_dataset": lambda: TinyTask(16),
    "tokenizer": tokenizer,
    "prompts": prompts,  # a data set with a column `prompt`
    "classifier": lambda: seeded(tiny_bert),
    "labeled_rows": labeled_rows,
    "network": lambda: seeded(network),
    "inputs": inputs,
    "targets": lambda: inputs()[:, :1],
}
