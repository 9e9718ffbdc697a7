"""The simulated pipeline has the waiting of the formula where nothing else takes time, and that of its links where they are slow."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

EXACT = ["--jitter", "0", "--latency", "0", "--update-seconds", "0", "--steps", "2"]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (3, 5), (16, 4)])
def test_without_links_and_jitter_the_waiting_is_that_of_the_formula(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, stages: int, micro_batches: int, backward: bool
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", *EXACT, "--link-bytes", "1e30"])
    row = recipe.simulate(recipe.arguments(), stages, micro_batches, backward)
    passes = micro_batches if backward else 2 * micro_batches
    assert row["waiting"] == pytest.approx((stages - 1) / (passes + stages - 1)) == row["formula"]
    assert row["seconds"] == pytest.approx(0.7 / stages * (passes + stages - 1) * (3 if backward else 1))


def test_a_slow_link_sets_the_pace(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", *EXACT, "--link-bytes", "1e7"])
    args = recipe.arguments()
    transfer = 2 * args.tokens * args.width / args.link_bytes
    row = recipe.simulate(args, 2, 50, backward=False)
    assert transfer > args.pass_seconds
    assert row["seconds"] == pytest.approx(2 * 50 * transfer + args.pass_seconds)
