"""Options of rules; `ZOConfig` has the same with `zo_` in front."""

from __future__ import annotations

from dataclasses import dataclass

from zo_hf.method_info import Choice, Name, Options, Real, Whole, option

AT_FOLD = ("carry", "reset")

#: A snapshot that takes longer than any run to estimate.
MOST_SVRG_STEPS = 100_000


@dataclass(frozen=True)
class RuleOptions(Options):
    """Options of the rules; see the help of each.

    Raises:
        ValueError: a value is out of range; the message names the option.
    """

    rule: str = option(
        "none",
        "The rule that changes the estimated gradient before the optimizer (optim) gets it. none changes nothing. "
        "sign takes the sign of c. conservative chooses the best of staying, stepping and stepping back, for three "
        "more forward passes, or two with a clean loss. curvature (or hizoo) is HiZOO, and needs "
        "zo_estimator=second_difference. muon takes the matrix sign (ZO-Muon). power_iteration (or mopi) takes the "
        "leading singular directions (ZO-MOPI). cocd is coherent coordinate descent, which keeps differences along "
        "coordinates and reuses them; it needs zo_estimator coordinate or coordinate_forward, and optim=sgd. svrg "
        "reduces variance by differences from a snapshot (MeZO-SVRG); zo_fold_steps must be a multiple of "
        "zo_svrg_batches + zo_svrg_steps. With muon and power_iteration, the learning rate is the root mean square "
        "of a step's entries. With sign, it is √q times that.",
        Name(),
        "'none' changes nothing",
    )
    momentum: float = option(
        0.0,
        "Weight of the past in the running mean of estimates, for zo_rule muon and power_iteration. The rule takes "
        "the singular directions of that mean; 0 uses only the latest estimate. Set the optimizer's own momentum "
        "through optim_args.",
        Real(0, 1, below=True),
        "use 0 for none",
    )
    momentum_at_fold: str = option(
        "carry",
        "The effect of a fold on the running mean of zo_momentum, for zo_rule muon and power_iteration: carry keeps it, "
        "reset sets it to zero.",
        Choice(AT_FOLD),
        "carry is the default",
    )
    spectral_rank: int | None = option(
        None,
        "Number of singular directions in a matrix's step, for zo_rule power_iteration. Default: half of all.",
        Whole(1, also=(None,)),
        "leave it out for half of all",
    )
    curvature_rate: float = option(
        1e-6,
        "Weight of a step in the running mean of the curvature, for zo_rule curvature. The paper uses 1e-8 to 1e-6.",
        Real(0, 1, below=True),
        "1e-6 is the paper's",
    )
    cocd_decay: float = option(
        0.99,
        "Factor that multiplies the remembered differences at every step, for zo_rule cocd. 0 forgets them and 1 keeps "
        "them.",
        Real(0, 1),
        "0 remembers nothing, and 1 forgets nothing",
    )
    cocd_memory: int | None = option(
        None,
        "Number of the latest differences that zo_rule cocd keeps. Default: one for each coordinate.",
        Whole(1, also=(None,)),
        "leave it out for one for each coordinate",
    )
    svrg_batches: int = option(
        9,
        "Number of steps in which zo_rule svrg estimates the gradient at a new snapshot, each from its own batch. Only the "
        "last of them moves, along that gradient.",
        Whole(1, MOST_SVRG_STEPS),
        "9 is the default",
    )
    svrg_steps: int = option(
        1,
        "Number of steps in which zo_rule svrg then uses the snapshot. The paper uses 1 (its q is 2).",
        Whole(1, MOST_SVRG_STEPS),
        "1 is the paper's",
    )
