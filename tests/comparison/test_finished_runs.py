"""The file of finished runs."""

from pathlib import Path

from zo_hf.comparison.finished_runs import FinishedRuns


def test_finished_runs_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    FinishedRuns(path, ["method", "seed"]).add({"method": "a", "seed": 0, "loss": 0.1})
    runs = FinishedRuns(path, ["method", "seed"])
    assert runs.find({"method": "a", "seed": 0}) == {"method": "a", "seed": 0, "loss": 0.1}
    assert runs.find({"method": "a", "seed": 1}) is None


def test_a_line_that_was_cut_off_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"seed": 0, "loss": 0.1}\n{"seed": 1, "lo')
    runs = FinishedRuns(path, ["seed"])
    assert runs.find({"seed": 1}) is None
    runs.add({"seed": 1, "loss": 0.2})
    again = FinishedRuns(path, ["seed"])
    assert [again.find({"seed": seed}) for seed in (0, 1)] == [{"seed": 0, "loss": 0.1}, {"seed": 1, "loss": 0.2}]
