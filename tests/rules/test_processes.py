"""Two processes: the same bits on both with every rule, and the log of the run leads to them."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
import torch

from tests.conftest import assert_same_bits, seeded, tiny_opt
from tests.parallel.launch import run
from tests.rules.helpers import options_of
from zo_hf.rules import RULES
from zo_hf.trajectory import read_trajectory, replay

SCRIPT = """
import os
import sys
from pathlib import Path
import torch
from tests.conftest import seeded, tiny_opt, weights_of
from tests.rules.helpers import options_of
from tests.trainer.runs import logged, make_trainer
from zo_hf.rules import RULES

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
for rule in RULES:
    for parallel in ("data", "directions"):
        options = options_of(rule, every=True) | {"zo_parallel": parallel, "zo_check_steps": 1, "max_steps": 5}
        options |= {"gradient_accumulation_steps": 2, "zo_batched_probes": False, "zo_rows_per_direction": 0}
        trainer = make_trainer(folder / f"{rule}-{parallel}", seeded(tiny_opt), **options)
        trainer.train()
        result = {"weights": weights_of(trainer.model), "passes": logged(trainer, "zo/forward_passes")}
        torch.save(result, folder / f"{rule}-{parallel}-{rank}.pt")
"""
PASSES = {"none": 4, "sign": 4, "conservative": 7, "curvature": 5, "muon": 4, "power_iteration": 4, "cocd": 4}
# Of a micro-batch in each of the five steps.
EACH = {rule: [passes] * 5 for rule, passes in PASSES.items()} | {"svrg": [4, 4, 8, 8, 4]}


@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    run(tmp_path / "run.py", 2, tmp_path, seconds=500)
    for rule in RULES:
        for parallel in ("data", "directions"):
            first, second = (torch.load(tmp_path / f"{rule}-{parallel}-{rank}.pt") for rank in range(2))
            assert_same_bits(second["weights"], first["weights"])
            assert first["passes"] == second["passes"] == [2 * passes for passes in accumulate(EACH[rule])]
            folder = tmp_path / f"{rule}-{parallel}"
            assert len(read_trajectory(folder).records) == 5
            assert options_of(rule)["zo_rule"] == read_trajectory(folder).header["settings"]["zo_rule"]
            assert_same_bits(dict(replay(seeded(tiny_opt), folder).state_dict()), first["weights"])
