"""Options of estimators; `ZOConfig` has the same with `zo_` in front."""

from __future__ import annotations

from dataclasses import dataclass

from zo_hf.method_info import Name, Options, Real, Whole, option

#: A step holds the losses at its probes, and a log their projected gradients.
MOST_DIRECTIONS = 100_000

#: Far beyond the weights of any model.
LONGEST_PROBE = 100.0


@dataclass(frozen=True)
class EstimatorOptions(Options):
    """Options of the estimators; see the help of each.

    Raises:
        ValueError: a value is out of range; the message names the option.
    """

    estimator: str = option(
        "two_point",
        "The estimator that turns losses into projected gradients. The cost in brackets is forward passes per step, "
        "with q = zo_num_directions. two_point takes central differences (2q). one_sided takes forward differences "
        "from one clean loss (q + 1). fzoo is one_sided, divided by the standard deviation of the losses (q + 1); "
        "its paper draws rademacher directions. evolution (or es) takes z-scores of the losses of antithetic pairs "
        "(2q). evolution_ranks takes their centered ranks (2q). forward_gradient takes exact derivatives by "
        "forward-mode differentiation (2q), and needs attn_implementation='eager'. second_difference is two_point "
        "with the clean loss, which also gives the curvature (2q + 1). coordinate takes central differences along "
        "the next q coordinates, one at a time (2q). coordinate_forward takes forward differences along them (q + "
        "1). For fzoo, the learning rate is zo_eps times the length of a step. For evolution and evolution_ranks, it "
        "is about the length of a step.",
        Name(),
        "'two_point' is MeZO's",
    )
    num_directions: int = option(
        1,
        "Number of directions per step (q). The help of zo_estimator gives the cost of each estimator.",
        Whole(1, MOST_DIRECTIONS),
        "1 is a good start",
    )
    rows_per_direction: int | str = option(
        0,
        "Number of rows of a batch that share a direction. With 1, every row has its own direction and gives its own "
        "projected gradient, in the same forward passes. The estimate is then less noisy, so the learning rate can "
        "be larger. With 0, all rows of a step share the directions, as in MeZO. auto chooses 1 if the method and "
        "the loss allow it, with at most 32 directions for a batch and 1024 for those of all processes, and 0 "
        "otherwise. A loss that is not a sum over rows keeps one direction for all rows, and the log says so. "
        "zo_direction='rademacher' is cheaper to draw than 'gaussian'.",
        Whole(0, also=("auto",)),
        "use 0 for one direction for all rows, or 'auto'",
    )
    noise_scale_steps: int = option(
        10,
        "Number of steps between measurements of the gradient noise scale, which zo/noise_scale logs in rows; 0 "
        "never measures. It needs zo_rows_per_direction above 0. A measurement costs no forward pass. In such a "
        "step, groups of rows share their directions in pairs.",
        Whole(0),
        "use 0 to never measure",
    )
    eps: float | None = option(
        None,
        "Distance of a probe along the direction. auto takes MeZO's values: 1e-3 for weights (low_rank, full, and "
        "PEFT methods that train weights), 1e-2 for LoRA, DoRA, IA3 and other adapters, and 1e-1 for prefixes and "
        "prompts. With server_url, auto is 1e-1, because a server in bfloat16 rounds away smaller differences.",
        Real(0, LONGEST_PROBE, above=True, also=(None,)),
        "use 'auto' for the subspace's default",
    )
