"""docs/options.md says what `ZOConfig` has: `python docs/_build/options.py` writes it anew."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from pathlib import Path

from zo_hf import ZOConfig

ROOT = Path(__file__).parents[2]


def test_the_reference_is_that_of_the_source() -> None:
    spec = importlib.util.spec_from_file_location("options_page", ROOT / "docs" / "_build" / "options.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert written == module.page(), "run `python docs/_build/options.py`"
    assert all(f"| `{option.name}` |" in written for option in fields(ZOConfig) if option.name.startswith("zo_"))
