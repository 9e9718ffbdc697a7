"""The simulation of a fleet: what groups of rows add to the messages and to a step."""

from __future__ import annotations

from argparse import Namespace
from types import ModuleType

import pytest

OPTIONS = {"workers": 10, "steps": 5, "forward_seconds": 1.0, "machine_spread": 0.0, "jitter": 0.0, "stall_share": 0.0}
OPTIONS |= {"stall_seconds": 60.0, "latency": 0.0, "uplink_bytes": 1e9, "late_by": 10, "seed": 0}


def test_every_group_of_rows_sends_two_losses_and_every_direction_is_drawn(recipe: ModuleType) -> None:
    args = Namespace(**OPTIONS, groups=4, draw_seconds=0.01)
    found = {directions: recipe.simulate(args, directions, 1.0) for directions in (4, 40)}
    for directions, row in found.items():
        assert row["bytes_up_per_step"] == 4 * 16 + 100
        assert row["bytes_down_per_step"] == directions * 8 + 100
    longer = found[40]["seconds_per_step"] - found[4]["seconds_per_step"]
    assert longer == pytest.approx(36 * 0.01 * 4 / 5, rel=1e-3)  # the last of five steps is not waited for
