"""The launch budget: how many kernels a step, an evaluation and a fold launch at real widths, and how often the host waits.

The bounds are what is reached. A change that needs more launches has to say why.
"""

from __future__ import annotations

from tests.gpu.count import Case

LLAMA, OPT = "Llama-8B", "OPT-125M"


def test_counts_are_affine_in_the_number_of_layers() -> None:
    one, two, three = (Case(OPT, {}).counted(layers) for layers in (1, 2, 3))
    for part in ("forward", "step", "evaluation"):
        assert [c - 2 * b + a for a, b, c in zip(one[part], two[part], three[part], strict=True)] == [0, 0, 0], part
