"""Every entry of the registries in a Trainer's run: stopped, resumed, replayed, and on two processes."""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import assert_same_bits, seeded, tiny_opt
from tests.methods.table import DIRECTIONS, SHORT, Combination, one_for_every_entry
from tests.parallel.launch import run
from tests.quantization.runs import held, load, write_base
from tests.subspaces.helpers import prepared
from tests.trainer.runs import SaveAt, logged, make_trainer
from zo_hf.subspaces import SUBSPACES, has_factors
from zo_hf.trajectory import replay

EVERY = one_for_every_entry()
STEPS, STOPPED_AT = 5, 3
# Whose kernels have derivatives of every kind.
build = partial(tiny_opt, attn_implementation="eager", num_hidden_layers=2)


def model_for(combination: Combination, folder: Path) -> nn.Module:
    """The tiny OPT as the subspace expects it; a quantized one is loaded from what is written into `folder`."""
    if combination.subspace == "scales":
        return load(folder if folder.exists() else write_base(folder, build), "int8")
    return prepared(combination.subspace, seeded(build))


def options_for(combination: Combination) -> dict[str, Any]:
    options: dict[str, Any] = {f"zo_{registry}": name for registry, name in asdict(combination).items()}
    options |= {f"zo_{name}": value for name, value in SHORT.get(combination.rule, {}).items()}
    folds = has_factors(SUBSPACES[combination.subspace])
    return options | {
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "zo_num_directions": DIRECTIONS,
        "zo_fold_steps": 2 if folds else None,
        "zo_rank": 2 if folds else None,
    }


@pytest.mark.slow
@pytest.mark.parametrize("combination", EVERY, ids=str)
def test_a_run_that_is_stopped_and_resumed_and_its_log_give_the_same_bits(
    tmp_path: Path, combination: Combination
) -> None:
    options, folder = options_for(combination), tmp_path / "run"
    before = held(model_for(combination, tmp_path / "base"))
    model = model_for(combination, tmp_path / "base")
    whole = make_trainer(folder, model, more={"callbacks": [SaveAt(STOPPED_AT)]}, **options)
    whole.train()
    after = held(whole.model)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert_same_bits(held(replay(model_for(combination, tmp_path / "base"), folder)), after)

    resumed = make_trainer(folder, model_for(combination, tmp_path / "base"), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(held(resumed.model), after)
    for key in ("loss", "zo/projected_grad", "zo/forward_passes"):
        assert logged(resumed, key) == logged(whole, key), key
    assert_same_bits(held(replay(model_for(combination, tmp_path / "base"), folder)), after)


SCRIPT = """
import sys
from pathlib import Path
from tests.methods.test_trainer import train_all

train_all(Path(sys.argv[1]))
"""


def train_all(folder: Path) -> None:
    """What each of two processes does: every entry, first on rows of its own, then on directions of its own."""
    rank = int(os.environ["RANK"])
    for combination in EVERY:
        for parallel in ("data", "directions"):
            options = {"zo_parallel": parallel, "per_device_train_batch_size": 8 if parallel == "directions" else 4}
            model = model_for(combination, folder / "base")
            trainer = make_trainer(folder / f"{combination}-{parallel}", model, **options_for(combination) | options)
            trainer.train()
            result = {"weights": held(trainer.model), "passes": logged(trainer, "zo/forward_passes")}
            torch.save(result, folder / f"{combination}-{parallel}-{rank}.pt")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    write_base(folder / "base", build)
    (folder / "run.py").write_text(SCRIPT)
    run(folder / "run.py", 2, folder, seconds=500)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["data", "directions"])
@pytest.mark.parametrize("combination", EVERY, ids=str)
def test_two_processes_hold_the_same_bits_and_their_log_replays_on_one(
    together: Path, combination: Combination, parallel: str
) -> None:
    first, second = (torch.load(together / f"{combination}-{parallel}-{rank}.pt") for rank in (0, 1))
    assert_same_bits(first["weights"], second["weights"])
    assert first["passes"] == second["passes"]
    replayed = replay(model_for(combination, together / "base"), together / f"{combination}-{parallel}")
    assert_same_bits(held(replayed), first["weights"])
