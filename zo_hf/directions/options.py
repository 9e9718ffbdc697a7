"""Options of directions; `ZOConfig` has the same with `zo_` in front."""

from __future__ import annotations

from dataclasses import dataclass

from zo_hf.method_info import Choice, Name, Options, Real, option

ORDERS = ("cyclic", "permuted")


@dataclass(frozen=True)
class DirectionOptions(Options):
    """Options of the directions; see the help of each.

    Raises:
        ValueError: a value is out of range; the message names the option.
    """

    direction: str = option(
        "gaussian",
        "The distribution of directions: gaussian, rademacher, sphere, orthogonal, sparse, layers (or lezo) or "
        "adaptive_layers. gaussian draws normal numbers, and rademacher draws random signs. sphere draws directions "
        "of one length. orthogonal makes the directions of a step orthogonal to each other. sparse moves small "
        "weights only (Sparse-MeZO). layers moves a few random layers in each step (LeZO). adaptive_layers draws "
        "layers with large projected gradients more often (AdaLeZO). ZOConfig's default, auto, is rademacher if "
        "every row has its own direction and zo_rule is none, and gaussian otherwise. Where the kernels of "
        "zo_kernels run, auto is also rademacher for zo_subspace full.",
        Name(),
        "'gaussian' is MeZO's",
    )
    active_layers: float | None = option(
        None,
        "Fraction of the layers that move in a step, for zo_direction layers and adaptive_layers. Default: 0.25.",
        Real(0, 1, above=True, also=(None,)),
        "0.25 moves a quarter of them",
    )
    coordinate_order: str = option(
        "cyclic",
        "The order of the coordinates, for zo_estimator coordinate and coordinate_forward: cyclic, or permuted (shuffled "
        "by the seed).",
        Choice(ORDERS),
        "cyclic is the default",
    )
