"""The whole job, on a tiny model and a handful of sentences."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.conftest import tiny_gpt2, tiny_llama, tiny_opt
from zo_hf import ZOConfig
from zo_hf.subspaces.sites import find_sites
from zo_hf.tasks import sentiment_job
from zo_hf.tasks.job_arguments import JobArguments
from zo_hf.tasks.label_word_loss import LabelWordLoss
from zo_hf.tasks.predicting import predict
from zo_hf.tasks.sentiment_job import main
from zo_hf.trainer.trainer import ZOTrainer
from zo_hf.trajectory import read_trajectory


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


def test_the_settings_of_the_demo_train_with_logits_of_the_label_words_alone(
    command_line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run: features that are kept, divided directions, and the same slopes with logits of all words."""
    settings = ["--config", str(Path(__file__).parents[2] / "recipes" / "last_norm.yaml")]
    slopes: list[list[tuple[float, ...]]] = []
    widths: set[int] = set()

    class Noting(LabelWordLoss):
        def __call__(self, outputs: Any, *args: Any, **kwargs: Any) -> Any:
            widths.add(outputs["logits"].shape[-1])
            return super().__call__(outputs, *args, **kwargs)

    monkeypatch.setattr(sentiment_job, "LabelWordLoss", Noting)
    for narrow in (True, False):
        if not narrow:
            monkeypatch.setattr(sentiment_job, "label_words_alone", lambda *_: nullcontext())
        main([*command_line, *settings])
        log = read_trajectory(tmp_path / "out")
        assert log.header["settings"]["zo_preconditioner"] == "inputs"
        slopes.append([record.projected_gradients for record in log.records])
    assert len(widths) == 2 and min(widths) == 2
    assert np.shape(slopes[0]) == (4, 4) and np.any(slopes[0])
    assert np.allclose(*slopes, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (tiny_llama, "model.norm.weight"),
        (tiny_opt, "model.decoder.final_layer_norm.weight"),
        (tiny_gpt2, "transformer.ln_f.weight"),
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2)),
            "backbone.norm_f.weight",
        ),
    ],
)
def test_the_settings_of_the_demo_move_the_last_norm(build: Callable[[], PreTrainedModel], name: str) -> None:
    settings = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "last_norm.yaml").read_text(encoding="utf-8"))
    assert [site.name for site in find_sites(build(), settings["zo_target_modules"])] == [name]


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Run the job, which must end with exit code 2; return its standard output and its error, one line."""
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in shown.err and line.endswith(".")
    return shown.out, line


def test_a_missing_model_ends_in_one_sentence(
    command_line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command_line[1] = str(tmp_path / "none")
    _, line = refused([*command_line, "--offline"], capsys)
    assert "could not be loaded" in line


def test_a_missing_column_ends_in_one_sentence(command_line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command_line[command_line.index("stars")] = "sentiment"
    _, line = refused(command_line, capsys)
    assert line.startswith("error: --label_column sentiment is not a column of the table; use one of")


def test_a_pattern_that_matches_nothing_ends_in_one_sentence_before_any_evaluation(
    command_line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shown, line = refused([*command_line, "--zo_target_modules", "nothing"], capsys)
    assert re.match(r"error: zo_target_modules='nothing' .* selects no trainable parameter", line)
    assert "zero-shot" not in shown


def test_a_refusal_that_names_suffice_for_comes_before_the_model_is_loaded(
    command_line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command_line[1] = str(tmp_path / "none")
    options = ["--learning_rate", "auto", "--zo_rule", "muon", "--zo_num_directions", "2"]
    shown, line = refused([*command_line, *options], capsys)
    assert re.fullmatch(r"error: learning_rate='auto' .*zo_rule='muon'.*give a number.*\.", line)
    assert not shown


@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rate", "auto", "--optim", "adagrad"], "learning_rate='auto' does not know .* Adagrad"),
        (["--zo_rule", "conservative", "--optim", "adamw_torch"], "zo_rule='conservative' compares .*AdamW"),
    ],
)
def test_a_refusal_when_training_begins_is_one_sentence(
    command_line: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, line = refused([*command_line, *options], capsys)
    assert re.match(f"error: {message}", line)
    assert "sentences" in shown and "zero-shot" not in shown


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_bug_keeps_its_traceback(command_line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ZOTrainer, **options: object) -> None:
        raise ValueError("this is a bug of a library.")

    monkeypatch.setattr(ZOTrainer, "train", broken)
    with pytest.raises(ValueError, match="a bug of a library"):
        main(command_line)


def test_help_tells_the_recipes_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"], "zo-hf train")
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: zo-hf train [options]")
    assert "(default: linear)" in shown and "(default: 250)" in shown
    assert "--zo_subspace VALUE" in shown and "--help-all" in shown
    assert "--adam_beta1" not in shown and "--zo_svrg_steps" not in shown and "SUPPRESS" not in shown


def test_all_options_have_a_help_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help-all"], "zo-hf train")
    shown = capsys.readouterr().out
    assert all(f"--{option.name} " in shown for option in (*fields(ZOConfig), *fields(JobArguments)) if option.init)


def test_an_unknown_option_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--zo_rnak", "3"], "zo-hf train")
    shown = capsys.readouterr().err
    assert end.value.code == 2 and shown.endswith(
        "error: there is no option --zo_rnak; write --zo_rank if you mean that.\n"
    )


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
