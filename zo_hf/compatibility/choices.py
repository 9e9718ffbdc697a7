"""Choices that "auto" leaves to the run, and the number of directions that follows from them."""

from __future__ import annotations

from zo_hf.case import Case
from zo_hf.estimators.options import MOST_DIRECTIONS
from zo_hf.evaluation.by_rows import AUTO_DIRECTIONS, BY_ROWS, RUNS_BY_ROWS
from zo_hf.subspaces import Full


def rows_per_direction(case: Case) -> int:
    """Return the setting, with "auto" resolved: 1 if everything in the run combines with it and it pays, else 0."""
    settings = case.settings
    if settings.rows_per_direction != "auto":
        return int(settings.rows_per_direction)
    combines = (
        settings.rule == "none"  # other rules divide the size of c out, and would then take longer steps
        and not settings.estimator_kind.is_scale_free  # their directions can share one forward pass
        and all(getattr(settings, name) in values for name, values in BY_ROWS.items())
        and all(case.argument(name) in values for name, values in RUNS_BY_ROWS.items())
        and not settings.is_private  # more directions, more noise
        and case.argument("server_url") is None  # every row would need adapters of its own
        and case.direction_kind.name in AUTO_DIRECTIONS
    )
    holds = directions_of_rows(case, 1) <= MOST_DIRECTIONS
    # A process of a sharded run that has no memory for its groups cannot fall back alone.
    return int(combines and holds and "fsdp" not in case.facts and settings.subspace != Full.name)


def auto_direction(case: Case) -> str:
    """Return what "auto" stands for: signs where they save time, and otherwise MeZO's Gaussian.

    For rows they cost an eighth to draw. All weights have a kernel that probes along signs without making a tensor of them.
    """
    settings = case.settings
    has_kernel = (
        "kernels" in case.facts
        and settings.subspace == Full.name
        and not settings.estimator_kind.needs_tangents
        and not settings.moves_along_coordinates
    )
    # HiZOO learns from the squares of a direction's entries, which signs do not have.
    return "rademacher" if (rows_per_direction(case) or has_kernel) and settings.rule == "none" else "gaussian"


def directions_of_rows(case: Case, rows: int) -> int:
    """Return the number of directions of a step in which each `rows` rows of a batch have their own; at least 1."""
    batch = case.argument("per_device_train_batch_size") or 1
    accumulation = case.argument("gradient_accumulation_steps") or 1
    return -(-batch // rows) * accumulation * case.settings.num_directions
