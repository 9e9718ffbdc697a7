"""Options that do not combine, and the choices that "auto" stands for."""

from __future__ import annotations

from zo_hf.compatibility.choices import auto_direction, rows_per_direction
from zo_hf.compatibility.conflict import Conflict
from zo_hf.compatibility.pipelined import is_pipelined
from zo_hf.compatibility.table import CONFLICTS, check

__all__ = ["CONFLICTS", "Conflict", "auto_direction", "check", "is_pipelined", "rows_per_direction"]
