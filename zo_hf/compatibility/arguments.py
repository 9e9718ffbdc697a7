"""Conflicts of methods with arguments of the Trainer, and arguments that are about a backward pass."""

from __future__ import annotations

from collections.abc import Callable

from transformers.training_args import OptimizerNames

from zo_hf.case import Case
from zo_hf.compatibility.conflict import Conflict, either, with_argument
from zo_hf.compatibility.optimizers import (
    MADE_BY_USER,
    NEEDS_BACKWARD,
    SCHEDULE_FREE,
    has_no_gradient,
    users_optimizers,
)
from zo_hf.directions import GivenMask, Sparse
from zo_hf.evaluation.curvature_probes import MEASURED
from zo_hf.rules import CoherentCoordinateDescent, Sign

#: Rules and directions for which the theory of stability has a critical learning rate.
STABILITY_RULES = ("none", "curvature")
STABILITY_DIRECTIONS = ("gaussian", "rademacher", "sphere", Sparse.name, GivenMask.name)


def _stability(option: str, choices: tuple[str, ...], value: Callable[[Case], str]) -> Conflict:
    return Conflict(
        "zo_stability_steps={zo_stability_steps}",
        f"zo_{option}={{zo_{option}}}",
        "the theory has no critical learning rate for it",
        f"use zo_{option}={either(choices)}, or leave zo_stability_steps out",
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


def _backward_only(name: str, why: str) -> Conflict:
    return Conflict(
        f"{name}={{{name}}}",
        "training without a backward pass",
        why,
        "leave it out",
        lambda case: bool(case.argument(name)),
    )


ARGUMENTS: tuple[Conflict, ...] = (
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
        with_argument("save_only_trajectory=True", name, why, lambda case: bool(case.argument("save_only_trajectory")))
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
    _backward_only("neftune_noise_alpha", "it adds noise only in training mode, and probes run in evaluation mode"),
    _backward_only("deepspeed", "it partitions gradients, and there are none"),
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
    _backward_only("activation_checkpointing", "it saves memory only in a backward pass"),
    _backward_only("gradient_checkpointing", "it saves memory only in a backward pass"),
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
        lambda case: has_no_gradient(case) and case.argument("optim") not in (None, OptimizerNames.SGD),
    ),
    Conflict(
        "optim_args={optim_args}",
        "zo_subspace='full'",
        "its seeded SGD takes no arguments",
        "leave it out, or use zo_subspace='low_rank'",
        lambda case: has_no_gradient(case) and bool(case.argument("optim_args")),
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
    *users_optimizers(
        "learning_rate='auto'",
        "the optimizer has a learning rate of its own",
        "leave one of them out",
        lambda case: case.argument("learning_rate") == "auto",
        MADE_BY_USER | {"own rates": "a parameter group with a learning rate of its own"},
    ),
    Conflict(
        "torch_compile=True",
        "zo_estimator={zo_estimator}",
        "a compiled model loses forward-mode derivatives",
        "leave it out",
        lambda case: bool(case.argument("torch_compile")) and case.settings.estimator_kind.needs_tangents,
    ),
)
