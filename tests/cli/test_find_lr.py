"""`zo-hf find-lr` on a tiny model and a handful of sentences, and the same search inside `zo-hf train`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.tasks.conftest import model, tokenizer  # noqa: F401
from zo_hf.cli import find_lr
from zo_hf.cli.main import main as zo_hf

pytestmark = pytest.mark.parametrize("model", ["llama"], indirect=True)
OPTIONS = {"text_column": "review", "label_column": "stars", "per_device_train_batch_size": 4, "use_cpu": True}


@pytest.fixture
def command_line(
    tmp_path: Path,
    model: PreTrainedModel,  # noqa: F811
    tokenizer: PreTrainedTokenizerFast,  # noqa: F811
) -> list[str]:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [f"film {i} is {'great' if i % 2 else 'dull'},{i % 2}" for i in range(40)]
    (tmp_path / "films.csv").write_text("\n".join(["review,stars", *rows]) + "\n")
    folders = {"model_name_or_path": "model", "train_file": "films.csv", "output_dir": "out"}
    options = {name: tmp_path / file for name, file in folders.items()} | OPTIONS
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_it_prints_and_plots_what_it_saw(
    command_line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zo_hf(["find-lr", *command_line, "--max_steps", "220"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("E[c^2]", "Tr H", "+-", "<- lowest", "warning"))
    assert re.search(r"^learning rate \S+, to within a factor of \S+, from 20 forward passes$", shown, re.MULTILINE)
    assert (tmp_path / "out" / "learning_rate.png").is_file()
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_the_rate_is_for_the_groups_of_rows_of_a_step(
    command_line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    zo_hf(["find-lr", *command_line, "--max_steps", "220", "--zo_rows_per_direction", "1"])
    assert "from 24 forward passes, for 4 groups of rows with directions of their own" in capsys.readouterr().out


def test_too_short_a_training_is_said(command_line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    zo_hf(["find-lr", *command_line, "--max_steps", "20"])
    shown = capsys.readouterr().out
    assert "warning: 2 forward passes are too few to find a learning rate, which takes at least 20" in shown


def test_a_refusal_is_one_sentence(command_line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        find_lr.main([*command_line, "--zo_rule", "muon", "--zo_num_directions", "2"])
    assert exit_info.value.code == 2
    shown = capsys.readouterr()
    assert re.fullmatch(r"error: learning_rate='auto' .*zo_rule='muon'.*give a number.*\.\n", shown.err)
    assert not shown.out, "the model was loaded before the refusal"
