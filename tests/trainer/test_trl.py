"""TRL's trainers, made forward-only: they train, file their metrics as TRL does, and learn what their gradient stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trl.toys import READY, config, folder_of, lines_of, rows, toy_tokenizer
from zo_hf import forward_only

trl = pytest.importorskip("trl")


@pytest.fixture
def tokenizer() -> Any:
    return toy_tokenizer()


TRAINERS = {name: READY[name] for name in ("SFT", "DPO", "KTO", "Reward")}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_of_trl_trains_and_files_training_metrics(name: str, tmp_path: Path, tokenizer: Any) -> None:
    data, options = TRAINERS[name]
    kind, made = forward_only(getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config"))
    trainer = kind(folder_of(name, tmp_path, tokenizer), args=config(made, tmp_path, **options), train_dataset=data())
    before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    trainer.train()
    lines = lines_of(trainer)
    assert len(lines) == 2 and not [key for line in lines for key in line if key.startswith("eval_")]
    assert lines[1]["num_tokens"] > lines[0]["num_tokens"] > 0
    assert any(not torch.equal(tensor, before[key]) for key, tensor in trainer.model.state_dict().items())


def test_an_evaluation_averages_no_probes_in(tmp_path: Path, tokenizer: Any) -> None:
    kind, made = forward_only(trl.SFTTrainer, trl.SFTConfig)
    data = rows("prompt", "completion")
    lines = []
    for steps in (1, 100):
        args = config(made, tmp_path, max_length=16, zo_fold_steps=1, eval_strategy="steps", eval_steps=steps)
        trainer = kind(folder_of("SFT", tmp_path, tokenizer), args=args, train_dataset=data, eval_dataset=data)
        trainer.train()
        trainer.evaluate()
        lines.append([line for line in trainer.state.log_history if "eval_loss" in line][-1])
    names = [key for key in lines[0] if not key.endswith(("_runtime", "_per_second"))]
    assert "eval_mean_token_accuracy" in names
    assert [lines[0][key] for key in names] == pytest.approx([lines[1][key] for key in names], abs=1e-6)


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_c_of_a_loss_with_detached_weights_is_the_slope_of_its_gradient(
    tmp_path: Path, tokenizer: Any, loss: str
) -> None:
    kind, made = forward_only(trl.SFTTrainer, trl.SFTConfig)
    options = {"max_steps": 1, "max_length": 16, "loss_type": loss, "zo_eps": 1e-4, "learning_rate": 1.0}
    options |= {"zo_rows_per_direction": 0}
    args = config(made, tmp_path, zo_exclude_modules=["embed_tokens", "lm_head"], **options)
    trainer = kind(folder_of("SFT", tmp_path, tokenizer), args=args, train_dataset=rows("prompt", "completion"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    given: dict[str, Any] = {}
    compute_loss = trainer.compute_loss

    def noted(model: Any, inputs: dict, **more: Any) -> Any:
        given.update(inputs=dict(inputs), more=more)
        return compute_loss(model, inputs, **more)

    trainer.compute_loss = noted
    trainer.train()
    c = lines_of(trainer)[0]["zo/projected_grad"]
    named = dict(trainer.model.named_parameters())
    step = {name: (p.detach() - before[name]) / -c for name, p in named.items()}
    for name, p in named.items():
        p.data.copy_(before[name])
    compute_loss(trainer.model, given["inputs"], **given["more"]).backward()
    slope = sum((step[name] * p.grad).sum().item() for name, p in named.items() if p.grad is not None)
    assert abs(c) > 1e-3 and c == pytest.approx(slope, rel=0.05, abs=3e-3)


def test_weights_that_a_loss_holds_constant_without_detach_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    data, usual = TRAINERS["DPO"]
    kind, made = forward_only(trl.DPOTrainer, trl.DPOConfig)
    args = config(made, tmp_path, **usual, use_weighting=True)
    with pytest.raises(ValueError, match=r"^use_weighting=True of DPOTrainer does not combine.*; \w+[^.]*\.$"):
        kind(folder_of("DPO", tmp_path, tokenizer), args=args, train_dataset=data())
