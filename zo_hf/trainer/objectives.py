"""Objectives whose gradient holds constant what moves with a probe.

Values that a loss detaches are constant over the probes of a batch (`zo_hf.trainer.stop_gradient`). TRL's DPO weighs its
loss by such values with `use_weighting=True`. It is refused, because no test compares its rows with the gradient yet.
"""

from __future__ import annotations

from transformers import Trainer


def depends_on_detached(trainer: Trainer) -> bool:
    """Return True if a trainer's loss is known to depend on values that it detaches.

    At the first step, the trained model is the reference model. KTO's estimate of their KL divergence is then 0 at least
    at one probe of two, because negative estimates are cut off. So a comparison at that probe would not show it.
    """
    return "KTOTrainer" in kinds_of_trl(type(trainer)) and bool(trainer.args.loss_type == "kto")


def check_objective(trainer: Trainer) -> None:
    """Refuse such an objective.

    Raises:
        ValueError: the trainer minimizes one; the message names the option and the way out.
    """
    if "DPOTrainer" in kinds_of_trl(type(trainer)) and trainer.args.use_weighting:
        raise ValueError(
            "use_weighting=True of DPOTrainer does not combine with training without a backward pass: it weighs the loss by "
            "constant probabilities of the trained model, and a probe moves them; leave it out."
        )


def kinds_of_trl(trainer: type) -> list[str]:
    """Return the names of the classes of TRL that a class is or inherits from, the nearest first."""
    return [kind.__name__ for kind in trainer.__mro__ if kind.__module__.partition(".")[0] == "trl"]
