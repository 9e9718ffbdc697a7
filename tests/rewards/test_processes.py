"""Two processes that learn from rewards: the same weights on both, and those of one process up to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import assert_same_bits, weights_of
from tests.parallel.launch import run
from tests.rewards.runs import trained
from tests.trainer.runs import logged

OPTIONS: dict[str, Any] = {"temperature": 0.7, "generations_per_prompt": 2, "max_steps": 4, "zo_check_steps": 1}
KEYS = ("loss", "reward", "reward_std", "rewards/odd_words/mean", "completions/mean_length", "completions/min_length")

SCRIPT = """
import os
import sys
from pathlib import Path
import torch
from tests.conftest import weights_of
from tests.rewards.runs import prompts, trained
from tests.rewards.test_processes import KEYS, OPTIONS
from tests.trainer.runs import logged

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
trainer = trained(folder / "run", per_device_train_batch_size=2, **OPTIONS)
assert trainer.args.world_size == 2
evaluated = trainer.evaluate(prompts(6))
torch.save(
    {"weights": weights_of(trainer.model), "eval_reward": evaluated["eval_reward"]}
    | {key: logged(trainer, key) for key in KEYS},
    folder / f"{rank}.pt",
)
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    from tests.rewards.runs import prompts

    (tmp_path / "run.py").write_text(SCRIPT)
    run(tmp_path / "run.py", 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same_bits(first["weights"], second["weights"])
    one = trained(tmp_path / "one", **OPTIONS)
    for key in KEYS:
        assert first[key] == second[key] == pytest.approx(logged(one, key)), key
    assert first["eval_reward"] == pytest.approx(one.evaluate(prompts(6))["eval_reward"])
    for name, tensor in weights_of(one.model).items():
        torch.testing.assert_close(first["weights"][name], tensor)
