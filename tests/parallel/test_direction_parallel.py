"""Ranks that evaluate different directions of one step give the weights of a single process, up to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import TinyTask, assert_same_bits, seeded, tiny_opt, weights_of
from tests.parallel.launch import run
from tests.trainer.runs import logged, trained

DATA = TinyTask(96)
CASES = {"directions": 8, "both": 2}  # zo_parallel, and q
ROWS, STEPS = 8, 16
OPTIONS = {
    "max_steps": STEPS,
    "learning_rate": 3e-4,
    "zo_eps": 1e-2,
    "zo_fold_steps": 6,
    "gradient_accumulation_steps": 2,
}
OPTIONS |= {"optim": "adamw_torch", "zo_normalize": True, "zo_rows_per_direction": 0}

SCRIPT = """
import os
import sys
from pathlib import Path
import torch
from tests.conftest import TinyTask, weights_of
from tests.parallel.test_direction_parallel import CASES, DATA, OPTIONS, ROWS, build
from tests.trainer.runs import logged, make_trainer

folder, rank, world_size = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
for parallel, directions in CASES.items():
    data = world_size // (world_size if parallel == "directions" else 2)
    options = OPTIONS | {"zo_parallel": parallel, "zo_num_directions": directions}
    options |= {"per_device_train_batch_size": ROWS // data}
    calls = 0
    model = build()
    model.register_forward_hook(lambda *_: globals().update(calls=calls + 1))
    options |= {"zo_batched_probes": False}
    trainer = make_trainer(folder / parallel, model, more={"train_dataset": DATA}, **options)
    trainer.train()
    result = {"weights": weights_of(model), "calls": calls, "samples": trainer.get_total_train_batch_size(trainer.args)}
    result |= {key: logged(trainer, key) for key in ("loss", "zo/forward_passes")}
    torch.save(result, folder / f"{parallel}-{rank}.pt")

# Data that differs between ranks which should share it is noticed before a step is made.
class OtherRows(TinyTask):
    def __getitem__(self, index):
        return super().__getitem__(index + rank)

options = OPTIONS | {"zo_parallel": "directions", "zo_num_directions": world_size}
trainer = make_trainer(folder / "differs", build(), more={"train_dataset": OtherRows(96)}, **options)
try:
    trainer.train()
except RuntimeError as error:
    torch.save({"message": str(error), "step": trainer.state.global_step}, folder / f"differs-{rank}.pt")
"""


def build() -> nn.Module:
    return seeded(tiny_opt, num_hidden_layers=1)


@pytest.fixture(scope="module", params=[pytest.param(processes, marks=pytest.mark.slow) for processes in (2, 4)])
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("directions")
    (folder / "run.py").write_text(SCRIPT)
    run(folder / "run.py", request.param, folder, seconds=600)
    return folder, request.param


@pytest.mark.parametrize("parallel", CASES)
def test_the_weights_do_not_depend_on_how_many_ranks_there_are(
    tmp_path: Path, launched: tuple[Path, int], parallel: str
) -> None:
    folder, world_size = launched
    several = [torch.load(folder / f"{parallel}-{rank}.pt") for rank in range(world_size)]
    for other in several[1:]:
        assert_same_bits(several[0]["weights"], other["weights"])
    options = OPTIONS | {"zo_num_directions": CASES[parallel], "per_device_train_batch_size": ROWS}
    one = trained(tmp_path, build(), more={"train_dataset": DATA}, zo_batched_probes=False, **options)
    for name, tensor in weights_of(one.model).items():
        torch.testing.assert_close(several[0]["weights"][name], tensor, rtol=0, atol=2e-5)
    assert several[0]["loss"] == pytest.approx(logged(one, "loss"), rel=1e-4)
    assert several[0]["zo/forward_passes"] == logged(one, "zo/forward_passes")
    assert several[0]["samples"] == one.get_total_train_batch_size(one.args) == 2 * ROWS


@pytest.mark.parametrize("parallel", CASES)
def test_the_directions_are_shared_out(launched: tuple[Path, int], parallel: str) -> None:
    folder, world_size = launched
    sharing = world_size if parallel == "directions" else 2
    for rank in range(world_size):
        calls = torch.load(folder / f"{parallel}-{rank}.pt")["calls"]
        # Steps, micro-batches, + and -; and two calls that find out whether the loss divides by num_items_in_batch.
        assert calls == STEPS * 2 * 2 * CASES[parallel] // sharing + 2


def test_ranks_that_should_share_a_batch_and_do_not_stop_before_the_first_step(launched: tuple[Path, int]) -> None:
    folder, world_size = launched
    for rank in range(world_size):
        stopped = torch.load(folder / f"differs-{rank}.pt")
        assert "different batches" in stopped["message"] and stopped["step"] == 0
