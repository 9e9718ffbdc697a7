"""Checkpoints and logs that version 0.1.0 wrote still load.

`data/version_0_1_0` holds two runs of that version: one with a checkpoint between two folds, whose state spells
"normalisation", and one over all weights. Beside each are the weights that its run ended with.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.conftest import seeded, tiny_opt
from tests.trainer.runs import trained
from zo_hf.trajectory import replay

SAVED = Path(__file__).parent / "data" / "version_0_1_0"
SMALL = {
    "hidden_size": 8,
    "ffn_dim": 8,
    "num_hidden_layers": 1,
    "word_embed_proj_dim": 8,
    "max_position_embeddings": 16,
}


def assert_ended_at(model: nn.Module, path: Path) -> None:
    # Not bit for bit: they were written on another machine, whose sums may differ in the last place.
    expected = load_file(path)
    actual = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert actual.keys() == expected.keys()
    base = dict(seeded(tiny_opt, **SMALL).named_parameters())
    assert any(not torch.equal(tensor, base[name]) for name, tensor in expected.items())
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["curvature", "hizoo"])
def test_a_run_is_resumed_under_both_names_of_its_rule(tmp_path: Path, rule: str) -> None:
    shutil.copytree(SAVED / "low_rank", tmp_path, dirs_exist_ok=True)
    options = {"zo_rank": 2, "zo_fold_steps": 3, "zo_normalize": True, "zo_estimator": "second_difference"}
    options |= {"zo_rule": rule, "zo_curvature_rate": 0.1, "optim": "adamw_torch", "max_steps": 8}
    trainer = trained(tmp_path, seeded(tiny_opt, **SMALL), resume=True, **options)
    assert trainer.state.global_step == 8
    assert_ended_at(trainer.model, SAVED / "low_rank" / "after_8_steps.safetensors")


def test_a_checkpoint_is_refused_with_other_settings(tmp_path: Path) -> None:
    shutil.copytree(SAVED / "low_rank", tmp_path, dirs_exist_ok=True)
    options = {"zo_rank": 3, "zo_fold_steps": 3, "zo_normalize": True, "zo_estimator": "second_difference"}
    options |= {"zo_rule": "curvature", "zo_curvature_rate": 0.1, "optim": "adamw_torch", "max_steps": 8}
    with pytest.raises(ValueError, match=r"zo_rank=2 and this run has zo_rank=3"):
        trained(tmp_path, seeded(tiny_opt, **SMALL), resume=True, **options)


@pytest.mark.parametrize(("run", "steps"), [("low_rank", 8), ("full", 4)])
def test_a_log_is_replayed(run: str, steps: int) -> None:
    learned = replay(seeded(tiny_opt, **SMALL), SAVED / run)
    assert_ended_at(learned, SAVED / run / f"after_{steps}_steps.safetensors")
