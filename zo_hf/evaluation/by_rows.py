"""Methods and arguments that combine with directions for groups of rows, and the reasons why others do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Values of settings, by the setting.
BY_ROWS: Mapping[str, Sequence[Any]] = {
    "estimator": ("two_point", "second_difference", "one_sided", "forward_gradient", "fzoo", "evolution"),
    "direction": ("gaussian", "rademacher", "sphere", "sparse", "layers"),
    "rule": ("none", "sign", "curvature", "conservative", "muon", "power_iteration", "svrg"),
}
#: Directions with which "auto" takes rows. No gain has been measured with the others, which cost more to draw or move less.
AUTO_DIRECTIONS = ("gaussian", "rademacher")
#: Values of arguments of a run.
RUNS_BY_ROWS: Mapping[str, Sequence[Any]] = {"zo_parallel": (None, "data", "pipeline")}

#: Reasons against other values of an option, and the values that a reason is about; () stands for all the rest.
NOT_BY_ROWS: Sequence[tuple[str, str, Sequence[Any]]] = (
    ("estimator", "an entry of the gradient is the slope of the whole loss", ("coordinate", "coordinate_forward")),
    ("estimator", "its projected gradients may not add up over rows", ()),
    ("direction", "it makes zo_num_directions directions orthogonal, and rows need more than that", ("orthogonal",)),
    ("direction", "it chooses layers by slopes of the whole loss", ("adaptive_layers",)),
    ("zo_parallel", "processes that divide the rows also divide their directions", ()),
)
