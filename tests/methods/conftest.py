"""Trainers here are as short as those of `tests/trainer`."""

from tests.trainer.conftest import _imports_are_no_garbage  # noqa: F401
