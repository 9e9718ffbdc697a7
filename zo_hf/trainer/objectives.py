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


def depends_on_detached(trainer: Trainer) -> bool:
    """Return True if a trainer's loss is known to depend on values that it detaches.

    At the first step, the trained model is the reference model. KTO's estimate of their KL divergence is then 0 at least
    at one probe of two, because negative estimates are cut off. So a comparison at that probe would not show it.
    """
    return "KTOTrainer" in _kinds_of_trl(trainer) and bool(trainer.args.loss_type == "kto")


def check_objective(trainer: Trainer) -> None:
    """Refuse an objective of the table.

    Raises:
        ValueError: the trainer minimizes such an objective; the message names the option and the way out.
    """
    kinds = _kinds_of_trl(trainer)
    for row in OBJECTIVES:
        if row.trainer in kinds and row.applies(trainer.args):
            raise ValueError(
                f"{row.option} of {row.trainer} does not combine with training without a backward pass: {row.why}, and a "
                f"probe moves it; {row.instead}."
            )


def _kinds_of_trl(trainer: Trainer) -> set[str]:
    return {kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.partition(".")[0] == "trl"}
