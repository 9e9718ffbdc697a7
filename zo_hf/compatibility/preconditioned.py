"""Rows of the table of what does not combine: directions divided by the size of inputs."""

from __future__ import annotations

from zo_hf.compatibility.conflict import Conflict, rows_of
from zo_hf.compatibility.pipelined import is_pipelined
from zo_hf.rules.hizoo import Curvature
from zo_hf.subspaces import LowRank, Norms

_SUBSPACES = ("auto", LowRank.name, Norms.name)


_preconditioned = rows_of("zo_preconditioner='inputs'", lambda case: case.settings.preconditioner == "inputs")


PRECONDITIONED: tuple[Conflict, ...] = (
    _preconditioned(
        "zo_subspace={zo_subspace}",
        "",
        "use zo_subspace='low_rank' or 'norms', or leave zo_preconditioner out",
        lambda case: case.settings.subspace not in _SUBSPACES,
    ),
    _preconditioned(
        "zo_basis='activation'",
        "one concentrates V on large inputs, and the other divides by their size",
        "use zo_basis='random', or leave zo_preconditioner out",
        lambda case: case.settings.basis == "activation",
    ),
    _preconditioned(
        "zo_rule='curvature'",
        "the rule divides directions by the curvature",
        "leave one of them out",
        lambda case: case.settings.rule == Curvature.name,
    ),
    _preconditioned(
        "zo_estimator={zo_estimator}",
        "its directions are single coordinates of length 1",
        "use zo_estimator='two_point'",
        lambda case: case.settings.moves_along_coordinates,
    ),
    _preconditioned(
        "zo_stability_steps={zo_stability_steps}",
        "the theory has no critical learning rate for directions of unequal lengths",
        "leave zo_stability_steps out",
        lambda case: bool(case.argument("zo_stability_steps")),
    ),
    _preconditioned(
        "learning_rate='auto'",
        "the search assumes that all coordinates of a direction have the same scale",
        "give a number",
        lambda case: case.argument("learning_rate") == "auto",
    ),
    _preconditioned(
        "fsdp=...",
        "every process would gather all weights for an extra forward pass",
        "leave zo_preconditioner out",
        lambda case: "fsdp" in case.facts,
    ),
    _preconditioned(
        "zo_parallel={zo_parallel} and zo_pipeline_stages={zo_pipeline_stages}",
        "every process would need the inputs of all layers",
        "leave zo_preconditioner out",
        is_pipelined,
    ),
)
