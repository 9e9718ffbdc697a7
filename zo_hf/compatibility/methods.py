"""Conflicts of methods with each other, whatever the model and whoever trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any

from zo_hf.case import Case
from zo_hf.compatibility.choices import directions_of_rows
from zo_hf.compatibility.conflict import Conflict, either
from zo_hf.directions import DISTRIBUTIONS, GivenMask, Layers
from zo_hf.directions.masked import Masked
from zo_hf.directions.options import DirectionOptions
from zo_hf.estimators.options import MOST_DIRECTIONS
from zo_hf.evaluation.by_rows import BY_ROWS, NOT_BY_ROWS, RUNS_BY_ROWS
from zo_hf.rules import RULES
from zo_hf.rules.options import RuleOptions
from zo_hf.rules.spectral import Spectral
from zo_hf.subspaces import Full


def _unused(
    part: str, registry: Mapping[str, Any], option: Field, uses_of: Callable[[Case], tuple[str, ...]]
) -> Conflict:
    """Return the row of an option that only some entries of a registry read.

    Args:
        part: "rule" or "direction".
        uses_of: gives the options that the run's entry reads.
    """
    name, default = option.name, option.default
    readers = [entry.name for entry in registry.values() if name in entry.uses]
    return Conflict(
        f"zo_{name}={{zo_{name}}}",
        f"zo_{part}={{zo_{part}}}",
        "",
        f"leave it out, or use zo_{part}={either(readers)}",
        lambda case: getattr(case.settings, name) != default and name not in uses_of(case),
    )


def _estimator_of_rule(rule: str) -> Conflict:
    needed = RULES[rule].needs_estimator
    return Conflict(
        f"zo_rule={rule!r}",
        "zo_estimator={zo_estimator}",
        "the rule needs numbers that this estimator does not give",
        f"use zo_estimator={either(needed)}",
        lambda case: case.settings.rule == rule and case.settings.estimator not in needed,
    )


def _by_rows(name: str, why: str, which: Sequence[Any]) -> Conflict:
    """Refuse `zo_rows_per_direction` with some values of an option, see `NOT_BY_ROWS`."""
    option = name if name.startswith("zo_") else f"zo_{name}"
    values = (BY_ROWS if name in BY_ROWS else RUNS_BY_ROWS)[name]
    named = either(value for value in values if value is not None)

    def applies(case: Case) -> bool:
        value = getattr(case.settings, name) if name in BY_ROWS else case.argument(name)
        is_meant = value in which if which else value not in values
        return case.settings.rows_per_direction not in (0, "auto") and is_meant

    return Conflict(
        "zo_rows_per_direction={zo_rows_per_direction}",
        f"{option}={{{option}}}",
        why,
        f"use zo_rows_per_direction=0, or {option}={named}",
        applies,
    )


METHODS: tuple[Conflict, ...] = (
    Conflict(
        "zo_rule={zo_rule}",
        "zo_subspace='full'",
        "the rule needs a gradient tensor, which this subspace never holds",
        "use zo_subspace='low_rank', which holds one",
        lambda case: case.settings.rule_kind.needs_tensors and case.settings.subspace == Full.name,
    ),
    *(_estimator_of_rule(rule.name) for rule in RULES.values() if rule.needs_estimator),
    *(
        _unused("rule", RULES, option, lambda case: case.settings.rule_kind.uses)
        for option in fields(RuleOptions)
        if option.name != "rule"
    ),
    Conflict(
        "zo_rule={zo_rule}",
        "zo_num_directions={zo_num_directions} without momentum",
        "the singular directions of a single random matrix carry no information",
        "use at least 2 directions (4 is a good start), or zo_momentum=0.9",
        lambda case: (
            issubclass(case.settings.rule_kind, Spectral)
            and case.settings.num_directions < 2
            and not case.settings.momentum
        ),
    ),
    Conflict(
        "zo_direction={zo_direction}",
        "zo_estimator={zo_estimator}, whose directions are coordinates",
        "",
        "leave it out",
        lambda case: (
            case.settings.moves_along_coordinates
            and (case.settings.direction != "gaussian" or case.direction_kind is GivenMask)
        ),
    ),
    Conflict(
        "zo_coordinate_order={zo_coordinate_order}",
        "zo_estimator={zo_estimator}",
        "",
        "leave it out, or use zo_estimator='coordinate'",
        lambda case: case.settings.coordinate_order != "cyclic" and not case.settings.moves_along_coordinates,
    ),
    *(
        _unused("direction", DISTRIBUTIONS, option, lambda case: case.direction_kind.uses)
        for option in fields(DirectionOptions)
        if option.name not in ("direction", "coordinate_order")
    ),
    *(_by_rows(name, why, values) for name, why, values in NOT_BY_ROWS),
    Conflict(
        "zo_rows_per_direction={zo_rows_per_direction}",
        "per_device_train_batch_size={per_device_train_batch_size} and gradient_accumulation_steps="
        "{gradient_accumulation_steps}",
        f"a step would have more than {MOST_DIRECTIONS} directions",
        "use zo_rows_per_direction=0, or a smaller batch",
        lambda case: (
            case.settings.rows_per_direction not in (0, "auto")
            and "per_device_train_batch_size" in case.arguments
            and directions_of_rows(case, int(case.settings.rows_per_direction)) > MOST_DIRECTIONS
        ),
    ),
    Conflict(
        "zo_estimator={zo_estimator}",
        "zo_batched_probes=True",
        "each of its probes needs a separate forward pass",
        "use zo_batched_probes='auto' or False",
        lambda case: case.settings.estimator_kind.needs_tangents and case.settings.batched_probes is True,
    ),
    Conflict(
        "zo_rule={zo_rule}",
        "zo_direction={zo_direction}",
        "the rule also moves layers of earlier steps, which this direction keeps still",
        "use zo_direction='gaussian', or zo_rule='none'",
        lambda case: case.settings.rule_kind.points > 1 and issubclass(case.direction_kind, Layers),
    ),
    Conflict(
        "zo_rule={zo_rule}",
        "zo_direction={zo_direction}",
        "the rule moves whole matrices, and this direction keeps some of their entries still",
        "use zo_direction='gaussian', or zo_rule='none'",
        lambda case: case.settings.rule_kind.fills_tensors and issubclass(case.direction_kind, Masked),
    ),
    Conflict(
        "zo_direction={zo_direction}",
        "zo_estimator={zo_estimator} and zo_subspace='full'",
        "a step whose layers do not reach the loss has no derivative",
        "use zo_subspace='low_rank', or zo_direction='gaussian'",
        lambda case: (
            case.settings.estimator_kind.needs_tangents
            and issubclass(case.direction_kind, Layers)
            and case.settings.subspace == Full.name
        ),
    ),
    Conflict(
        "zo_estimator={zo_estimator}",
        "a Full subspace",
        "it needs coordinates with a gradient, which Full never holds",
        "pass subspace='full', or a FullInMemory",
        lambda case: case.settings.moves_along_coordinates and isinstance(case.subspace, Full),
    ),
)
