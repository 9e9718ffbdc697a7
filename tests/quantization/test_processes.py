"""Quantized runs that are killed, and runs of two processes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.conftest import assert_same_bits
from tests.parallel.launch import Running, run
from tests.quantization.runs import held, model_for, write_base
from zo_hf.trajectory import replay

EVERY_PAIR = [
    (way, kind) for way in ("adapter", "factors", "folds", "folds gptq", "scales", "norms") for kind in ("int8", "nf4")
]

KILLED = """
import sys
import torch
from pathlib import Path
from tests.quantization.runs import held, run

folder, base, way, kind, resume = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5] == "resume"
options = {"max_steps": 40, "save_strategy": "steps", "save_steps": 4, "optim": "adamw_torch", "save_total_limit": 3}
options |= {"weight_decay": 0.1, "lr_scheduler_type": "linear"}
print("started", flush=True)
trainer = run(folder, way, base, kind, resume=resume, **options)
torch.save(held(trainer.model), folder / "final.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("way", "kind"), [("folds", "int8"), ("factors", "nf4 nested"), ("scales", "nf4")])
def test_a_killed_run_ends_with_the_bits_of_one_never_killed(tmp_path: Path, way: str, kind: str) -> None:
    base, script = write_base(tmp_path / "base"), tmp_path / "run.py"
    script.write_text(KILLED)

    def start(folder: Path, resume: str) -> Running:
        return Running(script, folder.with_suffix(".log"), folder, base, way, kind, resume)

    assert start(tmp_path / "whole", "new").wait(300) == 0
    killed = tmp_path / "killed"
    for attempt in range(20):
        process = start(killed, "resume" if any(killed.glob("checkpoint-*")) else "new")
        while process.code is None and process.said().count("projected_grad") < 11 + attempt % 5:
            time.sleep(0.002)
        if process.code is None:
            process.kill()
        if process.wait(300) == 0:
            break
    assert attempt > 1
    expected = torch.load(tmp_path / "whole" / "final.pt")
    assert_same_bits(torch.load(killed / "final.pt"), expected)
    assert_same_bits(held(replay(model_for(way, base, kind), killed)), expected)


TOGETHER = """
import os
import sys
import torch
from pathlib import Path
from tests.quantization.runs import held, run
from tests.quantization.test_processes import EVERY_PAIR

folder, base, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
for way, kind in EVERY_PAIR:
    # Each begins at weights of its own; the first one's count.
    own = base if rank == 0 else base.with_name("other")
    options = {"max_steps": 7, "per_device_train_batch_size": 4, "zo_check_steps": 2}
    if way == "folds gptq":
        options["zo_fold_rounding"] = "gptq"
    trainer = run(folder / f"{way}-{kind}", way.split()[0], own, kind, **options)
    torch.save(held(trainer.model), folder / f"{way}-{kind}-{rank}.pt")
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    write_base(folder / "base")
    write_base(folder / "other", initializer_range=0.03)
    (folder / "run.py").write_text(TOGETHER)
    run(folder / "run.py", 2, folder, folder / "base", seconds=500)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("way", "kind"), EVERY_PAIR)
def test_two_processes_hold_the_same_bits_and_their_log_replays_on_one(together: Path, way: str, kind: str) -> None:
    first, second = (torch.load(together / f"{way}-{kind}-{rank}.pt") for rank in (0, 1))
    assert_same_bits(first, second)
    before = held(model_for(way, together / "base", kind))
    assert first.keys() != before.keys() or any(not torch.equal(first[name], before[name]) for name in before)
    replayed = replay(model_for(way, together / "base", kind), together / f"{way}-{kind}")
    assert_same_bits(held(replayed), first)
