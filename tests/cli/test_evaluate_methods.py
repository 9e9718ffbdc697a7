"""`zo-hf evaluate-methods` on a tiny model and a tiny budget."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import seeded
from tests.tasks.conftest import make_tokenizer
from zo_hf.cli import evaluate_methods
from zo_hf.cli import main as cli
from zo_hf.comparison import processes, schedule
from zo_hf.comparison.job import Job
from zo_hf.comparison.report import FIGURES
from zo_hf.comparison.run import run
from zo_hf.comparison.subject import parts_of_task

SMALL = (
    "--seeds 0 1 --forward-passes 12 --trial-forward-passes 6 --rates 1 --trial-seeds 1 --evaluations 2 --batch-size 4"
)
SMALL += " --train-rows 16 --eval-rows 6 --processes 1 --methods low_rank"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A tiny decoder, for tasks made by rule."""
    from tests.conftest import tiny_llama

    tokenizer = make_tokenizer()
    seeded(tiny_llama, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("alignments", ["prompt", pytest.param("prompt head", marks=pytest.mark.slow)])
def test_it_goes_on_after_a_kill_and_reports_controls(
    alignments: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[Job] = []

    def killed_once(job: Job) -> dict[str, Any]:
        if len(jobs) == 7 and job not in jobs:
            jobs.append(job)
            raise KeyboardInterrupt
        jobs.append(job)
        return run(job)

    monkeypatch.setattr(schedule, "run", killed_once)
    monkeypatch.setattr(processes, "prepare_process", lambda: None)
    output = tmp_path / "out"
    words = f"evaluate-methods --model {folder} --tasks acceptability --output {output} {SMALL}".split()
    words += ["--alignments", *alignments.split()]
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 130
    assert "the finished runs are kept, and the same command continues" in capsys.readouterr().err
    assert len((output / "runs.jsonl").read_text().splitlines()) == 7

    cli.main(words)
    shown = capsys.readouterr().out
    runs = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    methods = ["low_rank", "forward gradient", "adamw with backward"]
    both = "head" in alignments
    assert len(runs) == len(jobs) - 1 == (1 + 3 * 3) + both * (2 + 3 * 3)
    assert [made["method"] for made in runs if made["seed"] == 1 and made["alignment"] == "prompt"] == methods
    assert all(math.isfinite(score["loss"]) for made in runs for score in made["scores"])
    assert all(made["peak_mib"] > 0 for made in runs if made["budget"] == 0)
    assert shown == (output / "report.md").read_text() + "\n"
    for line in ["| acceptability, prompt | 0.500 |", "| acceptability, bare text, fresh head | 0.500 |"][: 1 + both]:
        row = next(row for row in shown.splitlines() if row.startswith(line))
        assert row.split(" | ")[-1].rstrip(" |") in ("no signal", "reached", "estimator", "task", "open")
    assert all((output / name).stat().st_size > 5_000 for name, _, _ in FIGURES)

    monkeypatch.setattr(schedule, "run", lambda job: pytest.fail(f"made {job} again"))
    cli.main([*words, "--report-only"])
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--seeds 1 1", "--seeds 1 1 must differ"),
        ("--forward-passes 0", "--forward-passes 0 must be at least 1"),
        ("--ratio 1", "--ratio 1.0 must be above 1"),
        ("--tasks chess", "invalid choice: 'chess'"),
        ("--alignments both", "invalid choice: 'both'"),
        ("--methods telepathy", "--methods telepathy matches none of"),
        ("--add mine", "must be a name, a learning rate, and OPTION=VALUE words"),
        ("--tasks digits-cnn --train-rows 1700", "more than the 1797 pictures"),
        ("--model no-such-folder/model --tasks numbers", "--model no-such-folder/model could not be loaded"),
        ("--model no-such-folder --tasks numbers --report-only", "--model no-such-folder could not be loaded"),
    ],
)
def test_wrong_arguments_are_one_sentence_before_any_run(
    words: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schedule, "run", lambda job: pytest.fail("a run was made"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate-methods", "--output", str(tmp_path / "out"), *words.split()])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_an_encoder_gets_no_prompt(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    size = {"vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**size, intermediate_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot continue a prompt; use --alignments head"):
        evaluate_methods.alignments_of(str(tmp_path), ["prompt", "head"])
    assert evaluate_methods.alignments_of(str(tmp_path), ["head"]) == ["head"]
    assert evaluate_methods.alignments_of(str(tmp_path), None) == ["head", "fitted"], (
        "without a wish it gets what it can"
    )


def test_label_words_that_a_tokenizer_does_not_tell_apart_are_refused_before_any_run(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schedule, "run", lambda job: pytest.fail("a run was made"))
    words = f"evaluate-methods --model {folder} --tasks acceptability questions --output {tmp_path / 'out'} {SMALL}"
    with pytest.raises(SystemExit) as stopped:
        cli.main(words.split())
    assert stopped.value.code == 2
    # " person" and " place" both begin with the token of " p".
    assert "--tasks questions needs label words" in capsys.readouterr().err


def test_help_describes_every_task_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate-methods", "--help"])
    shown = capsys.readouterr().out
    for word in ("sentiment", "digits-cnn", "copa", "estimator", "--trial-forward-passes", "runs.jsonl"):
        assert word in shown


def test_a_task_with_fewer_rows_says_so(model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts_of_task.cache_clear()
    words = ["--model", model_folder, "--tasks", "sentiment", "--output", str(tmp_path / "out"), "--eval-rows", "30"]
    evaluate_methods.prepare(evaluate_methods.arguments(words, "zo-hf evaluate-methods"))
    parts_of_task.cache_clear()
    assert "task sentiment has fewer rows than wanted: 20 training, 10 development and 10 test rows" in (
        capsys.readouterr().err
    )
