"""The attack on a planted row, and the bound that the account sets to it."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import pytest
import torch

from zo_hf.privacy import Guarantee

pytest.importorskip("dp_accounting")


def test_the_evidence_of_a_number_grows_with_what_the_planted_row_would_add(recipe: ModuleType) -> None:
    known, run = torch.tensor([1.0, -2.0, 0.5, 4.0]), {"batch": 2, "rows": 4, "noise": 1.0, "max_c": 2.0}
    # Clipped to 2, the planted row adds 2 in half of the steps; the others have a mean of (1 - 2 + 0.5) / 2.
    low, middle, high = (recipe.evidence_of(-0.25 + shift, known, run) for shift in (0.0, 1.0, 4.0))
    assert low < middle < high and low < 0 < high
    assert middle == pytest.approx(0.0, abs=1e-12)  # halfway, where both are as likely


def test_the_largest_auc_is_that_of_two_normal_distributions(recipe: ModuleType) -> None:
    """Without sampling, T steps are one comparison of N(0, 1) with N(√T / σ, 1), whose AUC is Φ(√T / σ√2)."""
    found = recipe.best_auc(Guarantee(8.0, 10, 10, 1e-6), 16)
    assert found == pytest.approx(float(torch.special.ndtr(torch.tensor(4 / 8 / 2**0.5))), abs=5e-3)


def test_a_comparison_ends_with_a_table_and_a_plot(recipe: ModuleType, tmp_path: Path) -> None:
    args = argparse.Namespace(
        part="membership", noise=[recipe.OFF, 4.0], seeds=2, steps=3, rows=30, batch=6, rate=0.04
    )
    args.max_c, args.output = 2.0, tmp_path
    finished = recipe.FinishedRuns(tmp_path / "runs.jsonl", recipe.SETTINGS)
    lines = recipe.membership(args, finished)
    assert [line["noise"] for line in lines] == [recipe.OFF, 4.0]
    assert all(0 <= line[name] <= 1 for line in lines for name in ("AUC by log", "AUC by loss", "held-out accuracy"))
    assert "| not private | ∞ |" in recipe.table(lines)
    recipe.plot("membership", lines, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert recipe.membership(args, finished) == lines  # from the file
