"""Batches that wait on the host for their step, with the numbers that they always had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor

from tests.conftest import causal_batch, seeded, tiny_opt
from tests.trainer.runs import make_trainer, trained
from zo_hf import ZOTrainer
from zo_hf.evaluation import model_loss
from zo_hf.trainer.host_batches import labels_on_host


def test_batches_stay_on_the_host(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, seeded(tiny_opt, num_hidden_layers=1))
    loader = trainer.get_train_dataloader()
    assert isinstance(loader, DataLoaderShard) and loader.device is None


@pytest.mark.parametrize("method", ["get_batch_samples", "training_step", "_prepare_inputs"])
def test_a_subclass_that_sees_a_batch_first_finds_it_on_the_device(method: str, tmp_path: Path) -> None:
    kind = type("Own", (ZOTrainer,), {method: lambda self, *given: getattr(ZOTrainer, method)(self, *given)})
    loader = make_trainer(tmp_path, seeded(tiny_opt, num_hidden_layers=1), kind).get_train_dataloader()
    assert isinstance(loader, DataLoaderShard) and loader.device == torch.device("cpu")


def test_labels_of_a_batch() -> None:
    batch = causal_batch(2)
    assert labels_on_host(batch) is batch["labels"]
    assert labels_on_host({}) is None
    assert labels_on_host({"labels": batch["labels"].to("meta")}) is None
    assert labels_on_host({"labels": [1, 2]}) is None


def test_a_count_of_labels_is_the_same_on_any_device(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, seeded(tiny_opt, num_hidden_layers=1))
    batches = [causal_batch(2, seed=seed) for seed in (0, 1)]
    here = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    there = trainer._get_num_items_in_batch(batches, torch.device("meta"))
    assert there.device.type == "meta"
    assert (there.shape, there.dtype) == (here.shape, here.dtype)


def test_a_step_is_given_the_labels_that_were_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor | None] = []
    before = model_loss.only_labeled_logits

    def noted(model, inputs, in_front=0, labels_on_host=None):
        seen.append(labels_on_host)
        return before(model, inputs, in_front, labels_on_host)

    monkeypatch.setattr(model_loss, "only_labeled_logits", noted)
    trained(tmp_path, seeded(tiny_opt, num_hidden_layers=1), max_steps=2)
    assert len(seen) >= 2
    assert all(labels is not None and labels.device.type == "cpu" for labels in seen)
