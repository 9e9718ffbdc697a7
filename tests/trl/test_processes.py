"""TRL's losses by rows on two processes: the step of one process with the rows of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import weights_of
from tests.parallel.launch import run
from tests.trl.test_pairs import trainer_of
from tests.trl.toys import folder_of

SCRIPT = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from tests.trl.test_pairs import trainer_of
from tests.trl.toys import toy_tokenizer

name, folder, rank = sys.argv[1], Path(sys.argv[2]), __import__("os").environ["RANK"]
trainer = trainer_of(name, folder / rank, toy_tokenizer(), sys.argv[3], **eval(sys.argv[4]), per_device_train_batch_size=2)
trainer.train()
save_file(dict(trainer.model.state_dict()), folder / f"trained-{rank}.safetensors")
"""

OPTIONS: dict[str, Any] = {"learning_rate": 1e-3, "zo_rows_per_direction": 1, "zo_fold_steps": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("SFT", {}), ("SFT", {"padding_free": True, "max_length": None}), ("DPO", {}), ("Reward", {})],
    ids=str,
)
def test_two_processes_give_the_step_of_one(
    name: str, options: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    one = trainer_of(name, tmp_path / "one", tokenizer, **OPTIONS, **options)
    one.train()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run(script, 2, name, tmp_path, folder_of(name, tmp_path, tokenizer), OPTIONS | options)
    first, second = (load_file(tmp_path / f"trained-{rank}.safetensors") for rank in (0, 1))
    whole = weights_of(one.model)
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key])
        torch.testing.assert_close(tensor, whole[key], rtol=1e-3, atol=1e-4)
