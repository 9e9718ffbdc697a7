"""The whole job, on a tiny model and a handful of sentences."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from zo_hf.tasks.predict import predict
from zo_hf.tasks.sentiment_job import main


@pytest.fixture
def command_line(tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [f"film {i} is {'great' if i % 2 else 'dull'},{i % 2}" for i in range(40)]
    (tmp_path / "films.csv").write_text("\n".join(["review,stars", *rows]) + "\n")
    options = {
        "model_name_or_path": tmp_path / "model",
        "train_file": tmp_path / "films.csv",
        "text_column": "review",
        "label_column": "stars",
        "output_dir": tmp_path / "out",
        "max_steps": 4,
        "eval_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "num_progress_examples": 6,
        "use_cpu": True,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_the_job_trains_reports_and_leaves_a_model_that_predicts(
    command_line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command_line)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("majority", "zero-shot", "trained", "forward passes", "MiB peak"))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["held_out_examples"] == 20
    assert metrics["forward_passes"] > 0
    assert (tmp_path / "out" / "run.png").is_file()
    assert predict(tmp_path / "out", ["film 1 is great"])[0][0] in ("terrible", "great")


def test_a_missing_model_ends_in_one_sentence(command_line: list[str], tmp_path: Path) -> None:
    command_line[1] = str(tmp_path / "none")
    with pytest.raises(SystemExit, match="could not be loaded"):
        main([*command_line, "--offline"])


def test_a_missing_column_ends_in_one_sentence(command_line: list[str]) -> None:
    with pytest.raises(SystemExit, match="error: There is no column 'sentiment': set --label_column"):
        main([*command_line, "--label_column", "sentiment"])


def test_a_pattern_that_matches_nothing_ends_in_one_sentence_before_any_evaluation(
    command_line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"error: zo_target_modules='nothing' .* selects no trainable parameter"):
        main([*command_line, "--zo_target_modules", "nothing"])
    assert "zero-shot" not in capsys.readouterr().out


def test_help_tells_the_recipes_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"], "zo-hf train")
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: zo-hf train [options]")
    assert "(default: linear)" in shown and "(default: 250)" in shown


@pytest.mark.slow
def test_the_recipe_runs_in_two_processes(command_line: list[str], tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "opt_sst2.py"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*launch, str(recipe), *command_line], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("majority ") == 1
    assert (tmp_path / "out" / "metrics.json").is_file()
