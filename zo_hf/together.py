"""What does not go together: entries of different registries, each of which works with others."""

from __future__ import annotations

from zo_hf.directions import Distribution, Layers
from zo_hf.directions.masked import Masked
from zo_hf.estimators import ESTIMATORS, Estimator
from zo_hf.optimizers import Rule
from zo_hf.subspaces import Full, Subspace


def check_direction(estimator: str, direction: str) -> None:
    """Refuse a distribution of directions where directions are coordinates.

    Args:
        estimator, direction: names, as options have them.

    Raises:
        ValueError: the message says what to do instead.
    """
    if ESTIMATORS[estimator].along_coordinates and direction != "gaussian":
        raise ValueError(
            f"zo_direction={direction!r} has no effect on zo_estimator={estimator!r}, whose directions are coordinates; "
            "leave it out."
        )


def check_coordinates(estimator: str, subspace: Subspace) -> None:
    """Refuse a subspace without a gradient where directions are coordinates.

    Raises:
        ValueError: the message says what to pass instead.
    """
    if ESTIMATORS[estimator].along_coordinates and isinstance(subspace, Full):
        raise ValueError(
            f"estimator={estimator!r} needs coordinates with a gradient, which Full never holds; pass subspace='full' or a "
            "HeldFull."
        )


def check_together(estimator: Estimator, distribution: Distribution, rule: Rule, subspace: Subspace) -> None:
    """Refuse an estimator, a direction, a rule and a subspace that do not go together.

    Raises:
        ValueError: the message says which to use instead.
    """
    if rule.points > 1 and isinstance(distribution, Layers):
        raise ValueError(
            f"zo_rule={rule.name!r} moves along what it found in earlier steps, and zo_direction={distribution.name!r} is to "
            "leave the layers of those where they are; use zo_direction='gaussian', or zo_rule='none'."
        )
    if rule.fills_tensors and isinstance(distribution, Masked):
        raise ValueError(
            f"zo_rule={rule.name!r} moves whole matrices, and zo_direction={distribution.name!r} is to leave entries of them "
            "where they are; use zo_direction='gaussian', or zo_rule='none'."
        )
    if estimator.needs_tangents and isinstance(distribution, Layers) and isinstance(subspace, Full):
        raise ValueError(
            f"zo_direction={distribution.name!r} leaves zo_estimator={estimator.name!r} without a derivative where the layers of a step do "
            "not reach the loss; use zo_subspace='low_rank', or zo_direction='gaussian'."
        )
