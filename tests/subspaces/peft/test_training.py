"""Every method of PEFT through the Trainer: it learns, resumes, replays, and is saved as PEFT's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import default_data_collator

from tests.conftest import assert_same_bits, seeded, tiny_llama, weights_of
from tests.subspaces.peft.methods import Method, every_method
from tests.trainer.runs import SaveAt, make_trainer
from zo_hf.trajectory import replay


def trainer_for(method: Method, folder: Path, model: nn.Module, save_at: int = 0, **options: Any) -> Any:
    """A trainer on the method's task that moves by steps of a length, which suits methods of any scale."""
    data = {"train_dataset": method.task(), "eval_dataset": method.task(16)}
    more = data | ({"callbacks": [SaveAt(save_at)]} if save_at else {})
    options = {"learning_rate": method.lr, "zo_normalize": True, "zo_num_directions": 4} | options
    return make_trainer(folder, model, more=more, remove_unused_columns=False, **options)


def loss_of(method: Method, model: nn.Module) -> float:
    """Mean over the task's rows."""
    task = method.task()
    rows = default_data_collator([task[i] for i in range(len(task))])
    with torch.no_grad():
        return method.exact_loss(model, rows).item()


@every_method(only_common_by_default=True)
def test_it_learns_and_peft_alone_loads_what_was_saved(method: Method, tmp_path: Path) -> None:
    from peft import PeftModel

    model = method.model()
    before = loss_of(method, model)
    # Rows enough for a step that descends: how far is then the same, whatever a processor rounds.
    trainer = trainer_for(method, tmp_path, model, max_steps=40, per_device_train_batch_size=32)
    trainer.train()
    after = loss_of(method, model)
    assert after < 0.98 * before
    trainer.save_model(str(tmp_path / "saved"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {f.name for f in (tmp_path / "saved").iterdir()}
    loaded = PeftModel.from_pretrained(seeded(tiny_llama, initializer_range=0.2), tmp_path / "saved").eval()
    assert loss_of(method, loaded) == pytest.approx(after, rel=1e-5)


@every_method(only_common_by_default=True)
def test_it_resumes_and_replays_to_the_same_bits(method: Method, tmp_path: Path) -> None:
    whole = trainer_for(method, tmp_path / "whole", method.model(), save_at=3, max_steps=5)
    whole.train()
    expected = weights_of(whole.model)
    resumed = trainer_for(method, tmp_path / "resumed", method.model(), max_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_bits(weights_of(resumed.model), expected)
    assert_same_bits(weights_of(replay(method.model(), tmp_path / "whole")), expected)
    assert_same_bits(weights_of(replay(method.model(), tmp_path / "resumed")), expected)


@every_method(lambda method: "Prompt" in method.config[0] or "Prefix" in method.config[0])
def test_the_best_checkpoint_of_a_prompt_is_loaded_at_the_end(method: Method, tmp_path: Path) -> None:
    """Also where a network makes the prompt, which PEFT's file does not hold."""
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    # The second half runs away from the minimum.
    trainer = trainer_for(method, tmp_path, method.model(), max_steps=4, save_steps=2, learning_rate=5.0, **options)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
