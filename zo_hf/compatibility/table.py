"""One table of options that do not combine, with the reason and the way out.

`ZOConfig`, the engine and the trainer check a run against this table, each with the facts that it knows. `ZOConfig` knows
the options, and the trainer also the model and the optimizer. A requirement of one part alone, such as a range, is checked
by that part itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any

from transformers.training_args import OptimizerNames

from zo_hf.case import Case
from zo_hf.compatibility.choices import directions_of_rows
from zo_hf.compatibility.conflict import Conflict
from zo_hf.compatibility.graphs import GRAPHS
from zo_hf.compatibility.offloaded import OFFLOADED
from zo_hf.compatibility.pipelined import PIPELINED
from zo_hf.compatibility.preconditioned import PRECONDITIONED
from zo_hf.compatibility.private import PRIVATE
from zo_hf.compatibility.served import SERVED
from zo_hf.directions import DISTRIBUTIONS, GivenMask, Layers, Sparse
from zo_hf.directions.masked import Masked
from zo_hf.directions.options import DirectionOptions
from zo_hf.estimators.options import MOST_DIRECTIONS
from zo_hf.evaluation.by_rows import BY_ROWS, NOT_BY_ROWS, RUNS_BY_ROWS
from zo_hf.evaluation.curvature_probes import MEASURED
from zo_hf.rules import RULES, CoherentCoordinateDescent, Sign
from zo_hf.rules.options import RuleOptions
from zo_hf.rules.spectral import Spectral
from zo_hf.subspaces import Core, Full, LowRank

STABILITY_RULES = ("none", "curvature")
STABILITY_DIRECTIONS = ("gaussian", "rademacher", "sphere", Sparse.name, GivenMask.name)

NEEDS_BACKWARD = tuple(n for n in OptimizerNames if n.value.startswith(("lomo", "adalomo", "galore", "apollo")))
SCHEDULE_FREE = tuple(n for n in OptimizerNames if n.value.startswith("schedule_free"))

#: Optimizers that the user has made, by the fact that says so, and their names in errors.
USER_OPTIMIZERS = {"optimizers": "optimizers=...", "create_optimizer": "an optimizer made by create_optimizer"}


def _by_rows(name: str, why: str, which: Sequence[Any]) -> Conflict:
    """Refuse `zo_rows_per_direction` with some values of an option, see `NOT_BY_ROWS`."""
    option = name if name.startswith("zo_") else f"zo_{name}"
    values = (BY_ROWS if name in BY_ROWS else RUNS_BY_ROWS)[name]
    named = " or ".join(repr(value) for value in values if value is not None)

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


def check(case: Case) -> None:
    """Refuse a run that has a conflict of the table.

    Raises:
        ValueError: the run has a conflict; the message names both sides, the reason and the way out.
    """
    for conflict in CONFLICTS:
        if conflict.applies(case):
            raise ValueError(conflict.message(case))


def _full_without_gradient(case: Case) -> bool:
    return not case.settings.holds_gradient


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
        f"leave it out, or use zo_{part}={' or '.join(map(repr, readers))}",
        lambda case: getattr(case.settings, name) != default and name not in uses_of(case),
    )


def _estimator_of_rule(rule: str) -> Conflict:
    needed = RULES[rule].needs_estimator
    return Conflict(
        f"zo_rule={rule!r}",
        "zo_estimator={zo_estimator}",
        "the rule needs numbers that this estimator does not give",
        f"use zo_estimator={' or '.join(map(repr, needed))}",
        lambda case: case.settings.rule == rule and case.settings.estimator not in needed,
    )


def _stability(option: str, choices: tuple[str, ...], value: Callable[[Case], str]) -> Conflict:
    return Conflict(
        "zo_stability_steps={zo_stability_steps}",
        f"zo_{option}={{zo_{option}}}",
        "the theory has no critical learning rate for it",
        f"use zo_{option}={' or '.join(map(repr, choices))}, or leave zo_stability_steps out",
        lambda case: bool(case.argument("zo_stability_steps")) and value(case) not in choices,
    )


def _auto_rate(
    that: str,
    why: str,
    applies: Callable[[Case], bool],
    instead: str = "give a number, or leave learning_rate out for the default",
) -> Conflict:
    return Conflict(
        "learning_rate='auto'",
        that,
        why,
        instead,
        lambda case: case.argument("learning_rate") == "auto" and applies(case),
    )


def _with_argument(name: str, why: str, applies: Callable[[Case], bool], this: str) -> Conflict:
    return Conflict(
        this,
        f"{name}={{{name}}}",
        why,
        "leave one of them out",
        lambda case: bool(case.argument(name)) and applies(case),
    )


def _backward_only(name: str, why: str) -> Conflict:
    return Conflict(
        f"{name}={{{name}}}",
        "training without a backward pass",
        why,
        "leave it out",
        lambda case: bool(case.argument(name)),
    )


def _users_optimizers(
    this: str, why: str, instead: str, applies: Callable[[Case], bool], arguments: Mapping[str, str] = USER_OPTIMIZERS
) -> list[Conflict]:
    """Return the rows of an option that does not combine with an optimizer that the user has chosen.

    Args:
        arguments: the name in errors of every fact that says so.
    """

    def row(fact: str, argument: str) -> Conflict:
        return Conflict(argument, this, why, instead, lambda case: fact in case.facts and applies(case))

    return [row(fact, argument) for fact, argument in arguments.items()]


#: In the order in which a run is checked.
CONFLICTS: tuple[Conflict, ...] = (
    # Methods with each other.
    Conflict(
        "zo_rule={zo_rule}",
        "zo_subspace='full'",
        "the rule works on tensors that this subspace never holds",
        "use zo_subspace='low_rank', whose coordinates are held apart from the weights",
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
        "use zo_rows_per_direction=0, or smaller steps",
        lambda case: (
            case.settings.rows_per_direction not in (0, "auto")
            and "per_device_train_batch_size" in case.arguments
            and directions_of_rows(case, int(case.settings.rows_per_direction)) > MOST_DIRECTIONS
        ),
    ),
    Conflict(
        "zo_estimator={zo_estimator}",
        "zo_batched_probes=True",
        "each of its probes takes a forward pass of its own",
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
    # Methods with the Trainer's arguments.
    _stability("estimator", MEASURED, lambda case: case.settings.estimator),
    _stability("rule", STABILITY_RULES, lambda case: case.settings.rule),
    _stability("direction", STABILITY_DIRECTIONS, lambda case: case.direction_kind.name),
    Conflict(
        "zo_stability_action={zo_stability_action}",
        "zo_stability_steps=0, which measures nothing",
        "",
        "set zo_stability_steps=10, or leave it out",
        lambda case: case.argument("zo_stability_steps") == 0 and case.argument("zo_stability_action") != "warn",
    ),
    *(
        _with_argument(
            name, why, lambda case: bool(case.argument("save_only_trajectory")), "save_only_trajectory=True"
        )
        for name, why in (
            ("save_only_model", "each leaves out what the other saves"),
            ("load_best_model_at_end", "it needs the weights of a checkpoint"),
            ("auto_find_batch_size", "it needs the base weights again after a restart"),
        )
    ),
    Conflict(
        "max_grad_norm={max_grad_norm}",
        "zo_rule={zo_rule}",
        "it would shorten the step that the rule has chosen",
        "use max_grad_norm=0",
        lambda case: bool(case.argument("max_grad_norm")) and bool(case.settings.rule_kind.candidates),
    ),
    _backward_only("neftune_noise_alpha", "it adds noise in training mode only, and probes run in evaluation mode"),
    _backward_only("deepspeed", "it partitions gradients, of which there are none"),
    Conflict(
        "parallelism_config=... with cp_size, sp_size or tp_size above 1",
        "training without a backward pass",
        "a probe needs whole sequences and layers in one process",
        "use fsdp=..., or zo_parallel, which divides rows and directions",
        lambda case: any(
            getattr(case.argument("parallelism_config"), size, 1) > 1 for size in ("cp_size", "sp_size", "tp_size")
        ),
    ),
    # One option: newer versions of transformers call it by the first name and keep the second as an alias.
    _backward_only("activation_checkpointing", "it saves memory in a backward pass only"),
    _backward_only("gradient_checkpointing", "it saves memory in a backward pass only"),
    Conflict(
        "optim={optim}",
        "training without a backward pass",
        "it hooks into the backward pass",
        "use optim='sgd' or 'adamw_torch', whose state is small in a low-rank subspace",
        lambda case: case.argument("optim") in NEEDS_BACKWARD,
    ),
    Conflict(
        "optim={optim}",
        "evaluation during training",
        "it swaps parameters between training and evaluation",
        "use optim='sgd' or 'adamw_torch'",
        lambda case: case.argument("optim") in SCHEDULE_FREE,
    ),
    Conflict(
        "a schedule-free optimizer",
        "evaluation during training",
        "it swaps parameters between training and evaluation",
        "use optim='sgd' or 'adamw_torch'",
        lambda case: "schedule-free" in case.facts,
    ),
    Conflict(
        "optim={optim}",
        "zo_rule='cocd'",
        "it would average differences that the rule already remembers",
        "use optim='sgd', or zo_rule='none'",
        lambda case: (
            case.settings.rule == CoherentCoordinateDescent.name
            and case.argument("optim") not in (None, OptimizerNames.SGD)
        ),
    ),
    Conflict(
        "optim={optim}",
        "zo_subspace='full'",
        "it needs gradients, which this subspace never holds",
        "use optim='sgd', or zo_subspace='low_rank'",
        lambda case: _full_without_gradient(case) and case.argument("optim") not in (None, OptimizerNames.SGD),
    ),
    Conflict(
        "optim_args={optim_args}",
        "zo_subspace='full'",
        "its seeded SGD takes no arguments",
        "leave it out, or use zo_subspace='low_rank'",
        lambda case: _full_without_gradient(case) and bool(case.argument("optim_args")),
    ),
    _auto_rate(
        "zo_estimator={zo_estimator}",
        "the search needs slopes along random directions",
        lambda case: case.settings.estimator_kind.is_scale_free or case.settings.moves_along_coordinates,
    ),
    _auto_rate(
        "zo_rule={zo_rule}",
        "the search does not know how long the rule's steps are",
        lambda case: case.settings.rule not in ("none", Sign.name),
    ),
    _auto_rate(
        "max_grad_norm={max_grad_norm}",
        "the search does not know how long clipped steps are",
        lambda case: bool(case.argument("max_grad_norm")),
        "use max_grad_norm=0, or give a number",
    ),
    _auto_rate("fsdp=...", "the search does not work on shards of a model", lambda case: "fsdp" in case.facts),
    *_users_optimizers(
        "learning_rate='auto'",
        "the optimizer has a learning rate of its own",
        "leave one of them out",
        lambda case: case.argument("learning_rate") == "auto",
    ),
    Conflict(
        "torch_compile=True",
        "zo_estimator={zo_estimator}",
        "a compiled model loses tangents",
        "leave it out",
        lambda case: bool(case.argument("torch_compile")) and case.settings.estimator_kind.needs_tangents,
    ),
    # Methods and arguments with the model, its shards and the user's optimizer.
    Conflict(
        "fsdp=...",
        "zo_estimator={zo_estimator}",
        "the estimator needs whole weights for its tangents",
        "use zo_estimator='two_point'",
        lambda case: "fsdp" in case.facts and case.settings.estimator_kind.needs_tangents,
    ),
    Conflict(
        "fsdp=...",
        "zo_subspace='full'",
        "noise would be drawn for weights that other processes hold",
        "use zo_subspace='low_rank'",
        lambda case: "fsdp" in case.facts and case.settings.subspace == Full.name,
    ),
    Conflict(
        "zo_feature_cache_gib={zo_feature_cache_gib}",
        "fsdp=...",
        "every process would gather all weights for the rows that it alone has not seen",
        "use zo_feature_cache_gib=0",
        lambda case: bool(case.argument("zo_feature_cache_gib")) and "fsdp" in case.facts,
    ),
    Conflict(
        "zo_feature_cache_gib={zo_feature_cache_gib}",
        "torch_compile=True",
        "a compiled model runs all of its layers",
        "use zo_feature_cache_gib=0",
        lambda case: bool(case.argument("zo_feature_cache_gib")) and bool(case.argument("torch_compile")),
    ),
    *(
        _with_argument(name, "this is not supported", lambda case: "fsdp" in case.facts, "fsdp=...")
        for name in ("auto_find_batch_size", "torch_compile", "save_only_trajectory")
    ),
    *_users_optimizers(
        "fsdp=...",
        "the optimizer holds the model's parameters, which FSDP replaces by shards",
        "use optim=... or optimizer_cls_and_kwargs=..., which get the coordinates",
        lambda case: "fsdp" in case.facts,
    ),
    *_users_optimizers(
        "zo_subspace='full'",
        "it needs gradients, which this subspace never holds",
        "leave it out, or use zo_subspace='low_rank'",
        _full_without_gradient,
        USER_OPTIMIZERS | {"optimizer_cls_and_kwargs": "optimizer_cls_and_kwargs=..."},
    ),
    Conflict(
        "zo_basis='activation'",
        "zo_subspace={zo_subspace}",
        "",
        "use zo_subspace='low_rank', or leave zo_basis out",
        lambda case: case.settings.basis == "activation" and case.settings.subspace not in ("auto", LowRank.name),
    ),
    Conflict(
        "zo_fold_rounding='gptq'",
        "zo_subspace={zo_subspace}",
        "",
        "use zo_subspace='low_rank', or leave zo_fold_rounding out",
        lambda case: (
            case.settings.fold_rounding == "gptq" and case.settings.subspace not in ("auto", LowRank.name, Core.name)
        ),
    ),
    Conflict(
        "zo_basis='activation'",
        "fsdp=...",
        "every process would gather all weights for a forward pass of its own",
        "use zo_basis='random'",
        lambda case: case.settings.basis == "activation" and "fsdp" in case.facts,
    ),
    Conflict(
        "zo_subspace={zo_subspace}",
        "a quantized model that has an adapter",
        "the quantized base of an adapter cannot move",
        "use zo_subspace='adapter', which trains the adapter",
        lambda case: "adapter on a quantized model" in case.facts and case.settings.subspace in ("low_rank", "core"),
    ),
    Conflict(
        "zo_subspace='full'",
        "a quantized model",
        "its steps are too small for a quantized weight to represent",
        "use zo_subspace='low_rank', whose factors stay apart from the weights",
        lambda case: "quantized" in case.facts and case.settings.subspace == Full.name,
    ),
    Conflict(
        "torch_compile=True",
        "a quantized model",
        "its layers cannot be compiled",
        "leave it out",
        lambda case: "quantized" in case.facts and bool(case.argument("torch_compile")),
    ),
    Conflict(
        "fsdp=...",
        "a quantized model",
        "quantized weights cannot be sharded",
        "load the model with a device_map, or without quantization",
        lambda case: {"fsdp", "quantized"} <= case.facts,
    ),
    *OFFLOADED,
    *PRIVATE,
    *GRAPHS,
    *PIPELINED,
    *PRECONDITIONED,
    *SERVED,
)
