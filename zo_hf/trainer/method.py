"""The method of a training: its arguments, and for what they leave open, the choices of the run that is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from zo_hf import checkpoint
from zo_hf.case import Case
from zo_hf.compatibility import auto_direction, check, rows_per_direction
from zo_hf.settings import Settings
from zo_hf.trainer.config import ZOConfig


def method_of_run(
    config: ZOConfig, arguments: Mapping[str, Any], facts: frozenset[str], resumed_from: Path | None
) -> Settings:
    """Return the method of a run; a resumed run goes on with its rows and directions if the arguments leave them open.

    Args:
        config: the run's arguments.
        arguments: the same by name, as a `Case` has them.
        facts: see `Case`.
        resumed_from: the folder of a checkpoint; None begins anew.

    Raises:
        ValueError: options of the run do not combine.
    """
    settings = config.settings()
    saved = None if resumed_from is None else checkpoint.read_state(resumed_from).get("settings") or None
    if saved is not None and config.zo_rows_per_direction == "auto":
        rows = saved.get("zo_rows_per_direction", 0)
        settings = replace(settings, rows_per_direction="auto" if rows == 1 else rows)
    if config.zo_direction == "auto":
        auto = auto_direction(Case(settings, arguments, facts))
        settings = replace(settings, direction=auto if saved is None else saved.get("zo_direction", auto))
    case = Case(settings, arguments, facts)
    check(case)
    return settings if rows_per_direction(case) else replace(settings, rows_per_direction=0)
