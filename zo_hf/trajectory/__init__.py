"""The log of a run's optimizer steps; together with the base model it determines the fine-tuned model.

model = AutoModelForCausalLM.from_pretrained(base)
replay(model, "out")        # "out" is a run's output folder; model becomes the model at the end of that run
"""

from __future__ import annotations

from zo_hf.trajectory.log import Record, Trajectory, TrajectoryError, read_trajectory
from zo_hf.trajectory.replay import replay, verify

__all__ = ["Record", "Trajectory", "TrajectoryError", "read_trajectory", "replay", "verify"]
