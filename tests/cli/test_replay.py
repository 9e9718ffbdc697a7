"""`zo-hf replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.conftest import assert_same_bits, seeded, tiny_opt, weights_of
from tests.trainer.runs import trained, with_lora
from zo_hf.cli import main as cli


@pytest.fixture
def base(tmp_path: Path) -> Path:
    seeded(tiny_opt).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def refused(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["replay", *map(str, argv)])
    assert exit_info.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_the_saved_model_has_the_bits_of_the_run(
    tmp_path: Path, base: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trained(tmp_path / "out", load(base, dtype), max_steps=5)
    cli.main(["replay", str(tmp_path / "out"), "--model", str(base), "--output", str(tmp_path / "tuned")])
    assert_same_bits(weights_of(load(tmp_path / "tuned", dtype)), weights_of(trainer.model))
    shown = capsys.readouterr()
    assert "5 steps" in shown.out and "replayed 5 steps" in shown.out and "replay: 100%" in shown.err


def test_until_a_step_from_the_file_itself(tmp_path: Path, base: Path) -> None:
    trained(tmp_path / "out", load(base), max_steps=5)
    stopped = trained(tmp_path / "short", load(base), max_steps=2)
    log = tmp_path / "out" / "trajectory" / "steps.zolog"
    cli.main(["replay", str(log), "--model", str(base), "--until", "2", "--output", str(tmp_path / "tuned")])
    assert_same_bits(weights_of(load(tmp_path / "tuned")), weights_of(stopped.model))


def test_an_adapter_is_built_and_saved(tmp_path: Path, base: Path) -> None:
    from peft import PeftModel

    trainer = trained(tmp_path / "out", with_lora(load(base)), max_steps=3)
    cli.main(["replay", str(tmp_path / "out"), "--model", str(base), "--output", str(tmp_path / "tuned")])
    loaded = PeftModel.from_pretrained(load(base), tmp_path / "tuned")
    assert_same_bits(weights_of(loaded), weights_of(trainer.model))


def test_a_tokenizer_comes_along(tmp_path: Path, base: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a"))).save_pretrained(base)
    trained(tmp_path / "out", load(base), max_steps=1)
    cli.main(["replay", str(tmp_path / "out"), "--model", str(base), "--output", str(tmp_path / "tuned")])
    assert AutoTokenizer.from_pretrained(tmp_path / "tuned").get_vocab() == {"a": 0}


def test_verify_prints_what_the_log_holds(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "out", load(base), max_steps=3)
    cli.main(["replay", str(tmp_path / "out"), "--verify"])
    shown = capsys.readouterr().out
    assert "3 steps" in shown and "zo_subspace=low_rank" in shown and str(base) in shown
    cli.main(["replay", str(tmp_path / "out"), "--verify", "--model", str(base)])
    assert "is the base model of the log" in capsys.readouterr().out
    seeded(tiny_opt, seed=1).save_pretrained(tmp_path / "other")
    assert "was recorded from" in refused(capsys, tmp_path / "out", "--verify", "--model", tmp_path / "other")


def test_refusals_are_one_line(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "out", load(base), max_steps=3)
    assert "name the output folder" in refused(capsys, tmp_path / "nothing", "--verify")
    assert "--model BASE and --output DIR" in refused(capsys, tmp_path / "out")
    log = tmp_path / "out" / "trajectory" / "steps.zolog"
    content = bytearray(log.read_bytes())
    content[-5] ^= 4
    log.write_bytes(content)
    message = refused(capsys, tmp_path / "out", "--verify")
    assert "step 2" in message and "damaged" in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--until", "4"], "holds 3 steps, and until=4 is not among them"),
        (["--until", "-1"], "--until -1 must be at least 0"),
        (["--verify", "--until", "999"], "until=999"),
        (["--output", "HERE/file"], "is a file; name a folder"),
        (["--output", "HERE/base/."], "the base model's own folder"),
        (["--output", "HERE/out"], "the folder of the run"),
        (["--model", "HERE/nothing"], "nothing"),
    ],
)
def test_a_replay_that_would_not_do_what_is_asked_is_refused(
    tmp_path: Path, base: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "out", load(base), max_steps=3)
    (tmp_path / "file").write_text("kept")
    before = weights_of(load(base))
    options = {"--model": [base], "--output": [tmp_path / "tuned"]}
    options[words[0]] = [word.replace("HERE", str(tmp_path)) for word in words[1:]]
    given = [word for name, values in options.items() for word in (name, *values)]
    message = refused(capsys, tmp_path / "out", *given)
    assert says in message and message.splitlines()[-1].endswith(".")
    assert_same_bits(weights_of(load(base)), before)
    assert (tmp_path / "file").read_text() == "kept"


def test_help_is_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["replay", "--help"])
    shown = capsys.readouterr().out
    assert "zo-hf replay out --verify" in shown and "--until STEP" in shown


def test_a_model_of_ones_own_is_sent_to_python(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(base)
    model.__class__ = type("MineForCausalLM", (type(model),), {})
    trained(tmp_path / "out", model, max_steps=1)
    message = refused(capsys, tmp_path / "out", "--model", base, "--output", tmp_path / "tuned")
    assert "zo_hf.trajectory.replay(model, path)" in message
