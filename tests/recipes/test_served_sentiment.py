"""The recipe that trains through a server: on a tiny model and a stand-in, and on a real server if there is one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.serving.stand_in import serving
from zo_hf.tasks import data

#: Address of a server of the embedded SmolLM2-135M, which `python3 run.py serve` starts.
REAL = os.environ.get("ZO_HF_TEST_SERVER")


def run(recipe: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> Any:
    """What the recipe writes; None if it only prints."""
    monkeypatch.setattr(sys, "argv", ["recipe", "--output", str(folder), *arguments])
    recipe.main()
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def tiny(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_it_trains_and_compares(
    recipe: ModuleType,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [(f"a {word} film", label) for word in ("b", "c", "d", "e", "f") for label in (0, 1)]
    table = data.Dataset.from_dict({"text": [t + "." * y for t, y in rows], "label": [y for _, y in rows]})
    sentences = data.LabeledSentences("some", table, table.select(range(4)))
    monkeypatch.setattr(recipe, "embedded_reviews", lambda *_: sentences)
    with serving(lambda: tiny(model_folder), longest=128) as stand_in:
        common = ("--server", stand_in.url, "--model", str(model_folder), "--rows", "2")
        found = run(recipe, monkeypatch, tmp_path, *common, "--steps", "2", "--directions", "1")
        assert 0 <= found["before"] <= 1 and 0 <= found["after"] <= 1
        assert (tmp_path / "adapter_model.safetensors").exists()
        rewarded = run(
            recipe, monkeypatch, tmp_path / "reward", *common, "--steps", "5", "--directions", "1", "--reward"
        )
        assert [entry["reward"] for entry in rewarded["log"] if "loss" in entry] == [0.0]  # no member says the word
        run(recipe, monkeypatch, tmp_path / "noise", *common, "--noise", "2", "--distances", "1e-2")
    assert "| 0.01 | " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="ZO_HF_TEST_SERVER names no server")
def test_it_learns_on_a_real_server(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert REAL is not None
    found = run(recipe, monkeypatch, tmp_path, "--server", REAL, "--rows", "4", "--held-out", "32")
    losses = [entry["loss"] for entry in found["log"] if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert found["after"] > found["before"]
