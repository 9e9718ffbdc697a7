"""The ready-made pairs: their names, what they refuse, and runs of all of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import zo_hf.trl
from tests.conftest import assert_same_bits, weights_of
from tests.trl.toys import READY, config, folder_of, lines_of
from zo_hf import ZOConfig, ZOTrainer
from zo_hf.trl import trainers

pytest.importorskip("trl")


def trainer_of(name: str, folder: Path, tokenizer: Any, saved: str | None = None, **options: Any) -> Any:
    data, usual = READY[name]
    kind, made = (getattr(zo_hf.trl, f"ZO{name}{part}") for part in ("Trainer", "Config"))
    args = config(made, folder, **usual | options)
    more = {"processing_class": tokenizer} if name in ("CPO", "ORPO") else {}
    return kind(saved or folder_of(name, folder, tokenizer), args=args, train_dataset=data(), **more)


@pytest.mark.parametrize("name", trainers.READY)
def test_a_pair_is_made_once(name: str) -> None:
    kind, made = getattr(zo_hf.trl, f"ZO{name}Trainer"), getattr(zo_hf.trl, f"ZO{name}Config")
    assert issubclass(kind, ZOTrainer) and issubclass(made, ZOConfig)
    assert kind.__name__ == f"ZO{name}Trainer" and kind is getattr(zo_hf.trl, f"ZO{name}Trainer")
    assert {f"ZO{name}Trainer", f"ZO{name}Config"} <= set(dir(zo_hf.trl))


@pytest.mark.parametrize("kind", ["Trainer", "Config"])
@pytest.mark.parametrize(
    ("name", "instead"),
    [("GRPO", "zo_hf.rewards.EvolutionTrainer"), ("RLOO", "zo_hf.rewards.EvolutionTrainer"), ("GKD", "ZOSFTTrainer")],
)
def test_a_trainer_that_generates_is_refused_in_a_sentence(name: str, kind: str, instead: str) -> None:
    with pytest.raises(ImportError, match=rf"^zo_hf\.trl has no ZO{name}{kind}: .*{re.escape(instead)}[^.]*\.$"):
        getattr(zo_hf.trl, f"ZO{name}{kind}")


@pytest.mark.parametrize("name", ["ZONoTrainer", "SFTTrainer", "ZOSFT", "Trainer", "READY_"])
def test_other_names_are_missing(name: str) -> None:
    assert not hasattr(zo_hf.trl, name)


def test_without_trl_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"^ZOSFTTrainer needs trl\.SFTTrainer.*pip install 'zo_hf\[trl\]'"):
        _ = zo_hf.trl.ZOSFTTrainer


def test_an_import_of_the_package_takes_neither_trl_nor_torch() -> None:
    code = "import sys, zo_hf.trl; sys.exit(bool({'trl', 'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", READY)
def test_a_resumed_run_ends_in_the_same_bits(name: str, tmp_path: Path, tokenizer: Any) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "zo_fold_steps": 3, "learning_rate": 1e-3}
    whole = trainer_of(name, tmp_path, tokenizer, **options)
    before = weights_of(whole.model)
    whole.train()
    resumed = trainer_of(name, tmp_path, tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    after = weights_of(whole.model)
    assert_same_bits(after, weights_of(resumed.model))
    assert any(not torch.equal(after[key], before[key]) for key in before)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"trl", "zo_hf"} <= set(card.data.tags)
    assert "TRL" in card.text and "by zo_hf" in card.text


@pytest.mark.slow
@pytest.mark.parametrize("name", READY)
def test_the_loss_falls(name: str, tmp_path: Path, tokenizer: Any) -> None:
    rate = 3e-3 if name == "KTO" else 3e-4  # its loss is a tenth as steep
    options = {"max_steps": 100, "per_device_train_batch_size": 8, "learning_rate": rate, "zo_fold_steps": 20}
    trainer = trainer_of(name, tmp_path, tokenizer, **options)
    trainer.train()
    losses = [line["loss"] for line in lines_of(trainer)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 0.01 * abs(sum(losses[:10]))
