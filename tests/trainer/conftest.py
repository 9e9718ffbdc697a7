"""Trainer collects garbage at the start of every training: keep what the imports left out of each of these passes."""

from __future__ import annotations

import gc

import pytest

from tests.trainer import runs  # noqa: F401  imports everything that a training needs


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> None:
    gc.collect()
    gc.freeze()
