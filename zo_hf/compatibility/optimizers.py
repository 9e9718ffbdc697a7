"""Optimizers that a user may choose, and the rows about those that the user has made."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from transformers.training_args import OptimizerNames

from zo_hf.case import Case
from zo_hf.compatibility.conflict import Conflict

#: Values of `optim` that hook into a backward pass.
NEEDS_BACKWARD = tuple(n for n in OptimizerNames if n.value.startswith(("lomo", "adalomo", "galore", "apollo")))
#: Values of `optim` that swap parameters between training and evaluation.
SCHEDULE_FREE = tuple(n for n in OptimizerNames if n.value.startswith("schedule_free"))

#: Optimizers that the user has made, by the fact that says so, and their names in errors.
MADE_BY_USER = {"optimizers": "optimizers=...", "create_optimizer": "an optimizer made by create_optimizer"}


def users_optimizers(
    this: str, why: str, instead: str, applies: Callable[[Case], bool], arguments: Mapping[str, str] = MADE_BY_USER
) -> list[Conflict]:
    """Return the rows of an option that does not combine with an optimizer that the user has chosen.

    Args:
        this: the option with its value.
        why: the reason.
        instead: the way out.
        applies: returns whether a run has the option.
        arguments: the name in errors of every fact that says so.
    """

    def row(fact: str, argument: str) -> Conflict:
        return Conflict(argument, this, why, instead, lambda case: fact in case.facts and applies(case))

    return [row(fact, argument) for fact, argument in arguments.items()]


def has_no_gradient(case: Case) -> bool:
    """Return True if a run never holds the gradient that most optimizers read."""
    return not case.settings.holds_gradient
