"""A checkpoint's files with any content are refused in one sentence, with the model's weights untouched, or loaded."""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import assert_same_bits, seeded, tiny_opt, weights_of
from tests.trainer.runs import SaveAt, trained, with_lora
from tests.trajectory.hostile import VALUES, places
from zo_hf import ZerothOrder, checkpoint
from zo_hf.settings import Settings

SMALL = {"hidden_size": 8, "ffn_dim": 16, "num_hidden_layers": 1, "word_embed_proj_dim": 8}
RUNS: dict[str, dict[str, Any]] = {
    "low_rank": {"zo_rank": 2, "zo_normalize": True},
    "svrg": {"zo_rank": 2, "zo_rule": "svrg", "zo_svrg_batches": 1, "zo_fold_steps": 4},
    "muon": {"zo_rank": 2, "zo_rule": "muon", "zo_momentum": 0.5},
    "rows": {"zo_rank": 2, "zo_rows_per_direction": 2},
    "adaptive layers": {"zo_subspace": "full", "zo_direction": "adaptive_layers"},
    "adapter": {"zo_subspace": "adapter"},
}
FILES = ("zo_coordinates.safetensors", "zo_base.safetensors", "zo_rule.safetensors")


def base(run: str) -> nn.Module:
    model = seeded(tiny_opt, **SMALL)
    return with_lora(model, r=2) if run == "adapter" else model


@functools.cache
def saved(run: str) -> Path:
    """The checkpoint of a run after five steps, between two folds."""
    folder = Path(tempfile.mkdtemp())
    trained(folder, base(run), more={"callbacks": [SaveAt(5)]}, max_steps=5, **RUNS[run])
    return folder / "checkpoint-5"


@pytest.fixture(scope="module", autouse=True)
def removed() -> Any:
    yield
    for run in RUNS:
        if saved.cache_info().currsize:
            shutil.rmtree(saved(run).parent, ignore_errors=True)
    saved.cache_clear()


def load(run: str, folder: Path) -> str | None:
    """Load a checkpoint into a new engine; return the refusal, or None."""
    model = base(run)
    written = json.loads((saved(run) / "zo_state.json").read_text())["settings"]
    zo = ZerothOrder(model, Settings.from_saved(written))
    before = weights_of(model)
    try:
        checkpoint.load(zo, folder)
    except ValueError as error:
        message = str(error)
        assert message.endswith(".") and message.isprintable() and message.count(". ") == 0, message
        if "does not give the weights" not in message:  # which can only be seen when they are there
            assert_same_bits(weights_of(model), before)
        return message
    finally:
        zo.subspace.detach()
    return None


def copied(run: str, folder: Path) -> Path:
    return Path(shutil.copytree(saved(run), folder / "checkpoint-5"))


@pytest.mark.parametrize("run", RUNS)
def test_the_checkpoint_as_it_was_written_is_loaded(run: str) -> None:
    assert load(run, saved(run)) is None


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("run", RUNS)
def test_any_value_in_any_place_of_the_state(tmp_path: Path, run: str, number: int) -> None:
    folder, source = copied(run, tmp_path), random.Random(f"{run}/{number}")
    path = folder / checkpoint.STATE_FILE
    original = path.read_text()
    for place in source.sample(list(places(json.loads(original))), 6):
        content = json.loads(original)
        inner = content
        for key in place[:-1]:
            inner = inner[key]
        if place:
            inner[place[-1]] = "\0here"
        text = source.choice(VALUES)
        hostile = json.dumps(content).replace(json.dumps("\0here"), text) if place else text
        path.write_bytes(hostile.encode("utf-8", "surrogatepass"))
        load(run, folder)


Tensors = dict[str, torch.Tensor]
CHANGES: dict[str, Callable[[Tensors, str], object]] = {
    "of one number": lambda tensors, name: tensors.update({name: torch.zeros(1, 1, 1)}),
    "larger": lambda tensors, name: tensors.update({name: torch.zeros(1000)}),
    "gone": lambda tensors, name: tensors.pop(name),
    "renamed": lambda tensors, name: tensors.update({"no/such": tensors.pop(name)}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("run", "file"),
    [("low_rank", FILES[0]), ("low_rank", FILES[1]), ("svrg", FILES[2]), ("adapter", FILES[0])],
)
def test_tensors_that_are_not_this_runs_are_refused(tmp_path: Path, run: str, file: str, change: str) -> None:
    folder = copied(run, tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    CHANGES[change](tensors, max(tensors))
    (folder / file).unlink()  # it may be a hard link
    save_file(tensors, folder / file)
    assert file in (load(run, folder) or "")


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"\xff" * 100, (1 << 60).to_bytes(8, "little") + b"{}"])
def test_files_that_hold_no_tensors_are_refused(tmp_path: Path, content: bytes) -> None:
    folder = copied("low_rank", tmp_path)
    (folder / FILES[0]).write_bytes(content)
    assert FILES[0] in (load("low_rank", folder) or "")
