"""Memory planning: peak memory of every training setup of a model, from its config alone."""

from zo_hf.memory.assumptions import Assumptions
from zo_hf.memory.plan import Plan, Row, plan
from zo_hf.memory.size import parse_size

__all__ = ["Assumptions", "Plan", "Row", "parse_size", "plan"]
