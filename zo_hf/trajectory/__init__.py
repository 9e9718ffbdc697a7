"""The log of a run's optimizer steps: with the base model, it is the fine-tuned model.

model = AutoModelForCausalLM.from_pretrained(base)
replay(model, "out")        # a run's output folder: now the model that the run ended with
"""

from __future__ import annotations

from zo_hf.trajectory.log import Record, Trajectory, TrajectoryError, read_trajectory
from zo_hf.trajectory.replay import replay, verify

__all__ = ["Record", "Trajectory", "TrajectoryError", "read_trajectory", "replay", "verify"]
