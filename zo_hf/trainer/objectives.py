"""Objectives that forward passes cannot minimize, because they hold constant what moves with a probe.

Values that a loss passes through `detach` are constant over the probes of a batch (`zo_hf.trainer.stop_gradient`). The
objectives here compute weights of the loss from the trained model under `torch.no_grad()`. A gradient treats these weights
as constants, but a difference of losses would also follow their slope.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import Trainer


@dataclass(frozen=True)
class Objective:
    """One row of the table.

    Args:
        trainer: name of a trainer of TRL; its subclasses are meant as well.
        option: the option that chooses the objective, with its value, as errors show it.
        why: the reason.
        instead: the way out.
        applies: returns whether the arguments choose the objective.
    """

    trainer: str
    option: str
    why: str
    instead: str
    applies: Callable[[Any], bool]


OBJECTIVES = (
    Objective(
        "GRPOTrainer",
        "loss_type='vespo'",
        "it weighs log-probabilities by a constant function of themselves",
        "use loss_type='dapo'",
        lambda args: args.loss_type == "vespo",
    ),
    Objective(
        "DPOTrainer",
        "use_weighting=True",
        "it weighs the loss by constant probabilities of the trained model",
        "leave it out",
        lambda args: args.use_weighting,
    ),
    *(
        Objective(
            trainer,
            "teacher_model_kind='live'",
            "its teacher is the trained model held constant",
            "use teacher_model_kind='base' or 'ema'",
            lambda args: args.teacher_model_kind == "live",
        )
        for trainer in ("SDFTTrainer", "SDPOTrainer")
    ),
)


def check_objective(trainer: Trainer) -> None:
    """Refuse an objective of the table.

    Raises:
        ValueError: the trainer minimizes such an objective; the message names the option and the way out.
    """
    kinds = {kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.partition(".")[0] == "trl"}
    for row in OBJECTIVES:
        if row.trainer in kinds and row.applies(trainer.args):
            raise ValueError(
                f"{row.option} of {row.trainer} does not combine with training without a backward pass: {row.why}, and a "
                f"probe moves it; {row.instead}."
            )
