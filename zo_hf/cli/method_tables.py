"""The tables of `zo-hf methods`, from the registries of methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zo_hf.compatibility.conflict import either
from zo_hf.directions import DISTRIBUTIONS
from zo_hf.estimators import ESTIMATORS
from zo_hf.evaluation.by_rows import BY_ROWS
from zo_hf.method_info import Method
from zo_hf.rules import RULES, ScalarNormalization
from zo_hf.subspaces import SUBSPACES


@dataclass(frozen=True)
class Kind:
    """A table of methods.

    Args:
        option: the option that selects one of the methods.
        does: the common purpose of the methods.
        methods: the methods, by the value of the option.
    """

    option: str
    does: str
    methods: Mapping[str, Method]


OPTIMIZERS = {
    "optim=sgd": Method("ZO-SGD (2305.17333); momentum by optim_args", memory="0; d with momentum"),
    "optim=adamw_torch": Method("ZO-Adam (2402.11592)", memory="2d", needs="a subspace other than full"),
    "any other optim": Method("as in Trainer, without a backward pass", memory="as usual, for d", needs="gradients"),
    "zo_normalize": ScalarNormalization.about,
}

ROWS = {
    "0": Method("all rows, as in MeZO (2305.17333)", memory="0"),
    "k": Method(
        "groups of k rows, from 1 on",
        memory="2Gd",
        needs=", ".join(["a loss that is a sum over rows", *(f"zo_{o}={either(v)}" for o, v in BY_ROWS.items())]),
    ),
    "auto": Method("1 where it is known to pay, else 0", memory="as for k or 0"),
}


def kinds() -> dict[str, Kind]:
    """Return the tables by name, with the present content of the registries."""
    return {
        "estimators": Kind(
            "zo_estimator",
            "how losses become projected gradients",
            {name: entry.about for name, entry in ESTIMATORS.items()},
        ),
        "directions": Kind(
            "zo_direction",
            "the distribution of the directions",
            {name: entry.about for name, entry in DISTRIBUTIONS.items()},
        ),
        "rules": Kind(
            "zo_rule",
            "how the estimate becomes the gradient that the optimizer gets",
            {name: entry.about for name, entry in RULES.items()},
        ),
        "subspaces": Kind(
            "zo_subspace", "which tensors move", {name: entry.about for name, entry in SUBSPACES.items()}
        ),
        "optimizers": Kind("optim, zo_normalize", "how the gradient moves the coordinates", OPTIMIZERS),
        "rows": Kind("zo_rows_per_direction", "the rows of a batch that share a direction", ROWS),
    }
