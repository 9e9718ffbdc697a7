"""Several processes train as one: the same weights on all, bit for bit, and those of one process up to rounding.

They start from weights of their own, as adapters do that each process initializes: the first one's count.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from tests.conftest import TinyTask, assert_same_bits, seeded, tiny_opt, weights_of
from tests.parallel.launch import run
from tests.trainer.runs import logged, trained, with_lora
from zo_hf import ZOTrainer
from zo_hf.trajectory import replay

STEPS, SAVED_AT = 40, 24
SUBSPACES: dict[str, dict] = {
    "low_rank": {},
    "full": {"learning_rate": 1e-4},
    "adapter": {},
    "activation": {"zo_subspace": "low_rank", "zo_basis": "activation"},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = [(name, dtype) for name in SUBSPACES for dtype in DTYPES if (name, dtype) != ("activation", "bfloat16")]
OPTIONS = {"max_steps": STEPS, "learning_rate": 1e-4, "zo_eps": 1e-2, "zo_fold_steps": 10, "zo_check_steps": 16}
ROWS = 12


class Unequal(TinyTask):
    """Rows with one to four labels, so that the mean over processes is not the mean of their means."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        row["labels"] = row["labels"].clone()
        row["labels"][-1 - index % 4 :] = row["input_ids"][-1 - index % 4 :]
        return row


DATA = Unequal(16 * ROWS)

SCRIPT = """
import os
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.conftest import weights_of
from tests.parallel.test_data_parallel import CASES, DATA, OPTIONS, ROWS, SAVED_AT, STEPS, SUBSPACES, model_of
from tests.trainer.runs import At, SaveAt, logged, make_trainer

folder, rank, world_size = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
sent = 0

def counting(collective, argument):
    def wrapped(*args, **kwargs):
        global sent
        sent += args[argument].numel() * args[argument].element_size()
        return collective(*args, **kwargs)
    return wrapped

dist.all_gather = counting(dist.all_gather, 1)
dist.all_gather_into_tensor = counting(dist.all_gather_into_tensor, 1)
dist.all_reduce = counting(dist.all_reduce, 0)
dist.broadcast = counting(dist.broadcast, 0)

for subspace, dtype in CASES:
    sent = 0
    wrapped = At(None, lambda state, **kwargs: isinstance(trainer.model_wrapped, DistributedDataParallel))
    # Before a step's log, its collectives have been made, except the one of the log itself.
    seen = At(None, lambda state, **kwargs: sent)
    more = {"callbacks": [wrapped, seen, SaveAt(SAVED_AT)], "train_dataset": DATA}
    options = OPTIONS | {"zo_subspace": subspace} | SUBSPACES[subspace]
    options |= {"per_device_train_batch_size": ROWS // world_size}
    run = folder / f"{subspace}-{dtype}"
    trainer = make_trainer(run, model_of(subspace, dtype, rank), more=more, **options)
    assert trainer.args.world_size == world_size
    trainer.train()
    assert not any(wrapped.results) and len(wrapped.results) == STEPS
    result = {"weights": weights_of(trainer.model), "seen": seen.results}
    keys = ("loss", "zo/projected_grad", "zo/forward_passes", "zo/bytes_communicated")
    result |= {key: logged(trainer, key) for key in keys}

    # Killed after the checkpoint and resumed.
    del more["callbacks"]
    trainer = make_trainer(run, model_of(subspace, dtype, rank), more=more, **options)
    trainer.train(resume_from_checkpoint=True)
    result["resumed"] = weights_of(trainer.model)
    torch.save(result, folder / f"{subspace}-{dtype}-{rank}.pt")
"""


def model_of(subspace: str, dtype: str, seed: int = 0) -> torch.nn.Module:
    model = seeded(tiny_opt, DTYPES[dtype], seed=seed, num_hidden_layers=1)
    return with_lora(model) if subspace == "adapter" else model


@cache
def of_one_process(subspace: str, dtype: str) -> ZOTrainer:
    """A run with the same rows in each step."""
    options = OPTIONS | {"zo_subspace": subspace, "per_device_train_batch_size": ROWS} | SUBSPACES[subspace]
    with TemporaryDirectory() as folder:
        return trained(folder, model_of(subspace, dtype), more={"train_dataset": DATA}, **options)


@pytest.fixture(scope="module", params=[pytest.param(processes, marks=pytest.mark.slow) for processes in (2, 3, 4)])
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Every process's results of every case, from one launch; and the number of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "run.py").write_text(SCRIPT)
    run(folder / "run.py", request.param, folder, seconds=600)
    return folder, request.param


def results(launched: tuple[Path, int], subspace: str, dtype: str) -> list[dict]:
    folder, world_size = launched
    return [torch.load(folder / f"{subspace}-{dtype}-{rank}.pt") for rank in range(world_size)]


@pytest.mark.parametrize(("subspace", "dtype"), CASES)
def test_all_processes_hold_the_same_bits(launched: tuple[Path, int], subspace: str, dtype: str) -> None:
    first, *others = results(launched, subspace, dtype)
    before = weights_of(model_of(subspace, dtype))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in first["weights"].items())
    for other in others:
        assert_same_bits(first["weights"], other["weights"])
        for key in ("loss", "zo/projected_grad", "zo/forward_passes"):
            assert len(first[key]) == STEPS and first[key] == other[key]


@pytest.mark.parametrize(("subspace", "dtype"), CASES)
def test_they_equal_one_process_with_the_same_global_batch(
    launched: tuple[Path, int], subspace: str, dtype: str
) -> None:
    several, one = results(launched, subspace, dtype)[0], of_one_process(subspace, dtype)
    assert several["zo/forward_passes"] == logged(one, "zo/forward_passes")
    after, before = weights_of(one.model), weights_of(model_of(subspace, dtype))
    moved = sum(float((after[n].double() - before[n].double()).square().sum()) for n in after) ** 0.5
    apart = sum(float((after[n].double() - several["weights"][n].double()).square().sum()) for n in after) ** 0.5
    # In bfloat16 a loss has three digits, and c divides their difference by ε: batches of another size are other noise.
    assert apart < (1e-3 if dtype == "float32" else 0.5) * moved
    if dtype == "float32":
        for key in ("loss", "zo/projected_grad"):
            assert several[key] == pytest.approx(logged(one, key), rel=5e-3, abs=1e-3), key


@pytest.mark.parametrize(("subspace", "dtype"), CASES)
def test_they_resume_with_the_same_bits(launched: tuple[Path, int], subspace: str, dtype: str) -> None:
    for result in results(launched, subspace, dtype):
        assert_same_bits(result["resumed"], result["weights"])


@pytest.mark.parametrize(("subspace", "dtype"), CASES)
def test_their_one_trajectory_replays_on_one(launched: tuple[Path, int], subspace: str, dtype: str) -> None:
    replayed = replay(model_of(subspace, dtype), launched[0] / f"{subspace}-{dtype}")
    assert_same_bits(weights_of(replayed), results(launched, subspace, dtype)[0]["weights"])


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_another_number_of_processes_continues_the_run(
    tmp_path: Path, launched: tuple[Path, int], subspace: str
) -> None:
    several = results(launched, subspace, "float32")[0]
    checkpoint = launched[0] / f"{subspace}-float32" / f"checkpoint-{SAVED_AT}"
    options = OPTIONS | {"zo_subspace": subspace, "per_device_train_batch_size": ROWS} | SUBSPACES[subspace]
    more = {"train_dataset": DATA}
    one = trained(tmp_path, model_of(subspace, "float32"), more=more, resume=str(checkpoint), **options)
    assert one.state.global_step == STEPS
    for name, tensor in weights_of(one.model).items():
        torch.testing.assert_close(several["weights"][name], tensor, rtol=0, atol=1e-5)
    assert several["zo/forward_passes"][-1] == logged(one, "zo/forward_passes")[-1]


@pytest.mark.parametrize(("subspace", "dtype"), CASES)
def test_a_step_sends_a_few_scalars(launched: tuple[Path, int], subspace: str, dtype: str) -> None:
    for result in results(launched, subspace, dtype):
        logged_bytes, seen = result["zo/bytes_communicated"], result["seen"]
        # A log counts its own two collectives of four bytes too, which come after what was seen.
        assert [value - 8 for value in logged_bytes] == seen
        assert (logged_bytes[-1] - logged_bytes[0]) / (STEPS - 1) <= 64 + 16 * ROWS
        weights = [tensor for name, tensor in result["weights"].items() if "lm_head" not in name]  # which is tied
        assert logged_bytes[0] >= sum(
            tensor.numel() * tensor.element_size() for tensor in weights
        )  # once, at the start
