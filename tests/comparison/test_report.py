"""Tables and figures of constructed runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from zo_hf.comparison.job import Problem
from zo_hf.comparison.report import FIGURES, ProblemReport, details, page, plot, summary
from zo_hf.comparison.result import Result


def runs(finals: list[float], seconds: float = 1.0) -> Result:
    made = [
        {
            "forward_passes": 20,
            "forwards_per_step": 2,
            "seconds": seconds,
            "peak_mib": 100.0 + seed,
            "scores": [
                {"forward_passes": 10, "seconds": seconds / 2, "loss": 0.8, "accuracy": 0.5},
                {"forward_passes": 20, "seconds": seconds, "loss": 1 - final, "accuracy": final},
            ],
        }
        for seed, final in enumerate(finals)
    ]
    return Result("g", {1e-4: 0.4, 4e-4: 0.75}, made)


def report(alignment: str = "prompt", **results: list[float]) -> ProblemReport:
    untrained = {"forward_passes": 0, "seconds": 0.0, "loss": 0.9, "accuracy": 0.5}
    zero_shot = {"majority_accuracy": 0.55, "constant_loss": 0.69, "peak_mib": 80.0, "scores": [untrained]}
    problem = Problem("m", "numbers", alignment, 8, 100, 50, 16, "label_words")
    names = {"first": "adamw with backward", "exact": "forward gradient"}
    return ProblemReport(
        problem, {names.get(n, n): runs(finals) for n, finals in results.items()}, [zero_shot, zero_shot], {}
    )


def test_the_summary_has_controls_and_verdicts() -> None:
    both = [
        report(low_rank=[0.6, 0.61, 0.6], exact=[0.6, 0.6, 0.61], first=[0.9, 0.91, 0.9]),
        report("head", low_rank=[0.9, 0.9, 0.91]),
    ]
    header, _, first, second = summary(both, "accuracy").splitlines()
    assert header == (
        "| test accuracy | majority | untrained | low_rank | forward gradient | adamw with backward | verdict |"
    )
    assert first == (
        "| numbers, prompt | 0.550 | 0.500 ± 0.000 | 0.603 ± 0.006 (edge) | 0.603 ± 0.006 (edge) | 0.903 ± 0.006 (edge) "
        "| task |"
    )
    assert second == "| numbers, bare text, fresh head | 0.550 | 0.500 ± 0.000 | 0.903 ± 0.006 (edge) | - | - | - |"
    by_loss = summary(both[1:], "loss").splitlines()
    assert by_loss[0].startswith("| test loss |")
    assert by_loss[2] == "| numbers, bare text, fresh head | 0.690 | 0.900 ± 0.000 | 0.097 ± 0.006 (edge) | - |"


def test_titles_name_the_model_where_there_are_several() -> None:
    found = report(low_rank=[0.6, 0.61])
    other = replace(found, problem=replace(found.problem, model="folder/n"))
    assert "| numbers, prompt |" in summary([found], "loss")
    assert [row.split(" | ")[0] for row in summary([found, other], "loss").splitlines()[2:]] == [
        "| m: numbers, prompt",
        "| n: numbers, prompt",
    ]
    assert "Of 2 learning rates, 2 are the largest or the smallest tried" in page([found, other], "how")


def test_the_control_of_a_loss_is_the_lower_one() -> None:
    # The loss is 1 minus the accuracy here; untrained it is 0.9, and 0.69 for the best constant answer.
    found = report(low_rank=[0.5, 0.5], exact=[0.5, 0.5], first=[0.5, 0.5])
    assert found.verdict("loss") == "reached" and found.verdict("accuracy") == "no signal"
    assert report(low_rank=[0.2, 0.2], exact=[0.2, 0.2], first=[0.2, 0.2]).verdict("loss") == "no signal"


def test_details_name_rates_costs_and_failures() -> None:
    found = report(low_rank=[0.6, 0.7])
    found = ProblemReport(found.problem, found.results, found.zero_shot, {"rows": "ValueError: no"})
    text = details(found)
    assert "| low_rank | 2 | 0.0001 (edge) | 0.350 ± 0.071 | 0.650 ± 0.071 | 1.00 | 100 |" in text
    assert "| majority | | | 0.690 | 0.550 | | |" in text and text.endswith("failed: rows: ValueError: no\n")
    text = page([found], "how")
    assert text.startswith("how\n\n| test accuracy |") and text.index("| test accuracy |") < text.index(
        "| test loss |"
    )
    assert "| forward passes to the final loss of | low_rank |" in page([found], "how", ["low_rank", "rows"])


@pytest.mark.parametrize(("name", "key", "against"), FIGURES)
def test_figures_are_drawn(tmp_path: Path, name: str, key: str, against: str) -> None:
    plot([report(low_rank=[0.6, 0.7]), report("head", low_rank=[0.6], first=[0.9])], key, against, tmp_path / name)
    assert (tmp_path / name).stat().st_size > 5_000
