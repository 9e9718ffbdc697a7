"""What the README shows must run, and its options must exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from zo_hf import ZOConfig

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_every_python_block_is_python() -> None:
    assert len(PYTHON_BLOCKS) >= 3
    for block in PYTHON_BLOCKS:
        ast.parse(block)


def test_the_example_without_a_trainer_learns() -> None:
    block = next(block for block in PYTHON_BLOCKS if "zo.estimate" in block)
    names: dict = {}
    exec("import torch\ntorch.manual_seed(0)\n" + block, names)
    assert names["estimate"].loss < 0.2, "the targets have variance 2"
    assert not any("forward" in module.__dict__ for module in names["model"].modules())


def test_every_option_of_the_table_exists_with_that_default() -> None:
    defaults = {name: field.default for name, field in ZOConfig.__dataclass_fields__.items()}
    rows = re.findall(r"^\| (`zo_\w+`(?:, `zo_\w+`)*)(?: \(default\))? \| (.*?) \|", README, re.MULTILINE)
    named = {name for names, _ in rows for name in re.findall(r"`(zo_\w+)`", names)}
    assert named == {name for name in defaults if name.startswith("zo_")}
    shown = {
        "zo_rank": None,
        "zo_fold_steps": None,
        "zo_num_directions": 1,
        "zo_eps": "auto",
        "zo_batched_probes": "auto",
    }
    for name, value in shown.items():
        assert defaults[name] == value
