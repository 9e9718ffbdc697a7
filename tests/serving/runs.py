"""Short runs whose model a stand-in serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.conftest import seeded, tiny_llama
from tests.trainer.runs import make_trainer, with_lora
from zo_hf import ZOTrainer


def base() -> nn.Module:
    """The model that is trained and served, whose probabilities differ enough between tokens to compare models by."""
    return seeded(tiny_llama, eos_token_id=1, initializer_range=0.2)


def lora(**options: Any) -> nn.Module:
    """It with an adapter of rank 4."""
    return with_lora(base(), **options)


def make(folder: Path | str, url: Any = None, model: nn.Module | None = None, **options: Any) -> ZOTrainer:
    """A trainer of losses, with or without servers."""
    options = {"zo_fold_steps": None, "zo_num_directions": 2, "learning_rate": 1e-1, "max_steps": 3} | options
    options = {"zo_eps": 1e-2} | options  # the default is another one with servers
    options |= {"zo_rows_per_direction": 0, "per_device_train_batch_size": 4}
    if url is not None:
        options = {"server_url": url, "server_max_loras": 2, "server_timeout": 30.0} | options
    return make_trainer(folder, lora() if model is None else model, **options)


def adapter_of(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of the trainable weights."""
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
