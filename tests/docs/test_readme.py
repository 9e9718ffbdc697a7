"""The README stays a landing page, and the example without a Trainer learns what it promises."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readme_fits_on_a_landing_page() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 120


def test_the_example_without_a_trainer_learns() -> None:
    guide = (ROOT / "docs" / "guides" / "without_the_trainer.md").read_text(encoding="utf-8")
    block = next(block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "zo.estimate" in block)
    names: dict = {}
    exec("import torch\ntorch.manual_seed(0)\n" + block, names)
    assert names["estimate"].loss < 0.2, "the targets have variance 2"
    assert not any("forward" in module.__dict__ for module in names["model"].modules())
