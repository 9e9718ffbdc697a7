from pathlib import Path

import pytest

from zo_hf.tasks.run_plot import _forward_passes_by_step, plot_run

LOG = [
    {"step": 2, "loss": 1.0, "zo/forward_passes": 40},
    {"step": 3, "eval_accuracy": 0.5},
    {"step": 4, "loss": 0.9, "zo/forward_passes": 80},
]


def test_the_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_run(LOG, {"zero-shot": 0.5, "majority": 0.51}, 0.7, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_logs_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_run([], {}, 0.5, tmp_path / "run.png")
    assert (tmp_path / "run.png").is_file()


def test_evaluations_are_placed_between_the_logged_forward_passes() -> None:
    passes_at = _forward_passes_by_step(LOG)
    assert [passes_at(step) for step in (0, 1, 2, 3, 4)] == [0, 20, 40, 60, 80]
