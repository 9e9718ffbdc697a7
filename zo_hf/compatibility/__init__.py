"""Options that do not combine, and the choices that "auto" stands for."""

from __future__ import annotations

from zo_hf.compatibility.choices import auto_direction, rows_per_direction
from zo_hf.compatibility.conflict import Conflict
from zo_hf.compatibility.table import CONFLICTS, check

__all__ = ["CONFLICTS", "Conflict", "auto_direction", "check", "rows_per_direction"]
