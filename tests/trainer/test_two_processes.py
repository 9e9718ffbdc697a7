"""Two processes train as one: the same weights on both, bit for bit, and those of one process up to rounding.

They start from weights of their own, as adapters do that each process initialises: the first one's count.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import assert_same_bits, seeded, tiny_opt, weights_of
from tests.trainer.runs import logged, trained, with_lora
from zo_hf.trajectory import replay

ROOT = Path(__file__).parents[2]
SUBSPACES = {"low_rank": {}, "full": {"learning_rate": 1e-4}, "adapter": {}}
OPTIONS = {"max_steps": 20, "learning_rate": 1e-4, "zo_eps": 1e-2, "zo_fold_steps": 8}

RUN = """
import os
import sys
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
from tests.conftest import tiny_opt, weights_of
from tests.trainer.runs import At, SaveAt, logged, make_trainer, with_lora
from tests.trainer.test_two_processes import OPTIONS, SUBSPACES, model_of

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
for subspace, options in SUBSPACES.items():
    wrapped = At(None, lambda state, **kwargs: isinstance(trainer.model_wrapped, DistributedDataParallel))
    more = {"callbacks": [wrapped, SaveAt(10)]}
    options = OPTIONS | options | {"zo_subspace": subspace, "per_device_train_batch_size": 4}
    trainer = make_trainer(folder / subspace, model_of(subspace, rank), more=more, **options)
    assert trainer.args.world_size == 2
    trainer.train()
    assert not any(wrapped.results) and len(wrapped.results) == 20
    result = {"weights": weights_of(trainer.model)}
    result |= {key: logged(trainer, key) for key in ("loss", "zo/projected_grad", "zo/forward_passes")}
    result["eval_loss"] = trainer.evaluate()["eval_loss"]

    # Killed after step 10 and resumed.
    del more["callbacks"]
    trainer = make_trainer(folder / subspace, model_of(subspace, rank), **options)
    trainer.train(resume_from_checkpoint=True)
    result["resumed"] = weights_of(trainer.model)
    torch.save(result, folder / f"{subspace}-{rank}.pt")
"""


def model_of(subspace: str, seed: int = 0) -> torch.nn.Module:
    model = seeded(tiny_opt, seed=seed)
    return with_lora(model) if subspace == "adapter" else model


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both processes' results of every subspace, from one launch."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "run.py").write_text(RUN)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, *launch, str(folder / "run.py"), str(folder)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-5000:]
    return folder


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_both_processes_hold_the_same_bits(results: Path, subspace: str) -> None:
    first, second = (torch.load(results / f"{subspace}-{rank}.pt") for rank in (0, 1))
    assert_same_bits(first["weights"], second["weights"])
    before = weights_of(model_of(subspace))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in first["weights"].items())
    for key in ("loss", "zo/projected_grad", "zo/forward_passes"):
        assert len(first[key]) == 20 and first[key] == second[key]
    assert first["eval_loss"] == second["eval_loss"]


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_two_processes_equal_one_with_the_same_global_batch(tmp_path: Path, results: Path, subspace: str) -> None:
    two = torch.load(results / f"{subspace}-0.pt")
    options = OPTIONS | SUBSPACES[subspace] | {"zo_subspace": subspace, "per_device_train_batch_size": 8}
    one = trained(tmp_path, model_of(subspace), **options)
    for key in ("loss", "zo/projected_grad"):
        assert two[key] == pytest.approx(logged(one, key), rel=5e-3, abs=5e-4), key
    for name, tensor in weights_of(one.model).items():
        torch.testing.assert_close(two["weights"][name], tensor, rtol=0, atol=5e-6)
    assert two["eval_loss"] == pytest.approx(one.evaluate()["eval_loss"], rel=1e-4)
    assert two["zo/forward_passes"] == logged(one, "zo/forward_passes")


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_two_processes_resume_with_the_same_bits(results: Path, subspace: str) -> None:
    for rank in (0, 1):
        result = torch.load(results / f"{subspace}-{rank}.pt")
        assert_same_bits(result["resumed"], result["weights"])


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_the_trajectory_of_two_processes_is_one_and_replays_on_one(results: Path, subspace: str) -> None:
    replayed = replay(model_of(subspace), results / subspace)
    assert_same_bits(weights_of(replayed), torch.load(results / f"{subspace}-0.pt")["weights"])
