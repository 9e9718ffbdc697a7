"""Cores small enough for matrices as small as the tests' are."""

from __future__ import annotations

import pytest

from zo_hf.subspaces import Core


@pytest.fixture(autouse=True)
def _small_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Core, "default_rank", 3)
