"""Two processes find one rate, from losses that both have a part in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.launch import run

SCRIPT = """
import os
import sys
from pathlib import Path
import torch
from tests.conftest import weights_of
from tests.trainer.test_learning_rate import Few, RUN
from tests.trainer.runs import trained

options = RUN | dict(parallel.split("=") for parallel in sys.argv[2:]) | {"zo_check_steps": 1}
trainer = trained(Path(sys.argv[1]) / "run", kind=Few, learning_rate="auto", zo_num_directions=2, **options)
found = trainer.found_learning_rate
torch.save((found.learning_rate, found.probes, found.prediction, weights_of(trainer.model)),
           Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["data", "directions"])
def test_processes_find_the_same(tmp_path: Path, parallel: str) -> None:
    import torch

    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run(script, 2, tmp_path, f"zo_parallel={parallel}")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert first[:3] == second[:3]
    assert all(torch.equal(first[3][name], second[3][name]) for name in first[3])
