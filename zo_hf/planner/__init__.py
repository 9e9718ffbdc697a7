"""What fits on a GPU: peak memory of every way to fine-tune a model, from its config alone."""

from zo_hf.planner.assumptions import Assumptions
from zo_hf.planner.plan import Plan, Row, plan
from zo_hf.planner.size import parse_size

__all__ = ["Assumptions", "Plan", "Row", "parse_size", "plan"]
