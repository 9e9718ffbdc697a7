"""What goes wrong on one rank: weights that change there alone, and a process that dies."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import assert_same_bits
from tests.parallel.launch import Running, finish, log_of, run, start

TIME_OUT = 30  # seconds, ddp_timeout of the runs

CORRUPTED = """
import os
import sys
from pathlib import Path
import torch
from tests.conftest import seeded, tiny_opt
from tests.trainer.runs import At, make_trainer

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])

def corrupt(name):
    def action(state, **kwargs):
        if rank == 1:
            tensors = dict(kwargs["model"].named_parameters()) | trainer.zo.subspace.coordinates
            tensors[name].data.view(-1)[7] += 1e-3
    return action

weight = "model.decoder.layers.1.fc1.weight"  # frozen in this run
coordinate = "model.decoder.layers.0.self_attn.k_proj.weight"
for where, name in {"weight": weight, "coordinate": coordinate}.items():
    options = {"zo_check_steps": 2, "max_steps": 40, "zo_target_modules": ".*layers[.]0[.].*", "zo_fold_steps": 0}
    at = At({5}, corrupt(name))
    trainer = make_trainer(folder / where, seeded(tiny_opt), more={"callbacks": [at]}, **options)
    try:
        trainer.train()
        message = "no error"
    except RuntimeError as error:
        message = str(error)
    torch.save({"message": message, "step": trainer.state.global_step}, folder / f"{where}-{rank}.pt")
"""


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corrupted")
    (folder / "run.py").write_text(CORRUPTED)
    run(folder / "run.py", 2, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "name", "latest"),
    [
        ("weight", "model.decoder.layers.1.fc1.weight", 6 + 2 * 7),
        ("coordinate", "layers.0.self_attn.k_proj.weight", 6),
    ],
)
def test_a_change_on_one_rank_stops_the_run_and_is_named(corrupted: Path, where: str, name: str, latest: int) -> None:
    """A coordinate at the next check; any other weight before every part has had its turn."""
    for rank in (0, 1):
        stopped = torch.load(corrupted / f"{where}-{rank}.pt")
        assert name in stopped["message"] and "rank 1 of 2" in stopped["message"]
        assert f"at step {stopped['step']} " in stopped["message"]
        assert 5 <= stopped["step"] <= latest


DYING = """
import sys
import torch
from tests.conftest import seeded, tiny_opt, weights_of
from tests.trainer.runs import trained

folder, resume, steps = sys.argv[1], sys.argv[2] == "resume", int(sys.argv[3])
options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 10, "zo_fold_steps": 15, "optim": "adamw_torch"}
options |= {"zo_rows_per_direction": 0}
options |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "lr_scheduler_type": "linear"}
options |= {"save_total_limit": 2, "ddp_timeout": 30, "zo_check_steps": 5}
print("started", flush=True)
trainer = trained(folder, seeded(tiny_opt), resume=resume, **options)
if trainer.is_world_process_zero():
    torch.save(weights_of(trainer.model), folder + "/final.pt")
"""


KILLS = 8


def has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("checkpoint-*/trainer_state.json"))


def steps_said(process: Running) -> int:
    return process.said().count("projected_grad")


@pytest.mark.slow
def test_when_a_rank_dies_the_other_says_so_and_stops(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(DYING)
    processes = start(script, 2, tmp_path, "new", 100_000)
    deadline = time.monotonic() + 120
    while steps_said(processes[0]) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].kill()
    killed = time.monotonic()
    codes = finish(processes, TIME_OUT + 30)
    assert codes == [1, -signal.SIGKILL], log_of(script, 0).read_text()[-3000:]
    assert time.monotonic() - killed < TIME_OUT + 20
    assert "the process of rank 1 of this run has stopped" in log_of(script, 0).read_text()


@pytest.mark.slow
def test_kills_of_a_random_rank_end_with_the_bits_of_a_run_never_killed(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    for each in (whole, folder):
        each.mkdir()
        (each / "run.py").write_text(DYING)
    run(whole / "run.py", 2, whole, "new", 120)

    script, chance, kills = folder / "run.py", random.Random(0), 0
    while not (folder / "final.pt").exists():
        processes = start(script, 2, folder, "resume" if has_checkpoint(folder) else "new", 120)
        victim, target = chance.randrange(2), chance.randint(1, 14)
        while kills < KILLS and all(process.code is None for process in processes):
            if steps_said(processes[0]) >= target:
                time.sleep(chance.uniform(0, 0.05))
                processes[victim].kill()
                kills += 1
                break
            time.sleep(0.005)
        begun = time.monotonic()
        codes = finish(processes, 300)
        if any(codes):
            # One was killed and the other stopped by itself, soon; it may have been past its last collective.
            assert codes[victim] == -signal.SIGKILL and codes[1 - victim] in (0, 1), log_of(script, 0).read_text()
            assert time.monotonic() - begun < TIME_OUT + 20
    assert kills == KILLS
    assert_same_bits(torch.load(folder / "final.pt"), torch.load(whole / "final.pt"))
