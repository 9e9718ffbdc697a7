"""`zo-hf plan` prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zo_hf.cli import main as cli
from zo_hf.cli import plan as command
from zo_hf.memory import Assumptions, Plan
from zo_hf.memory.plan import Row
from zo_hf.memory.setups import Setup

LLAMA_3_8B = str(Path(__file__).parents[1] / "memory" / "configs" / "llama-3-8b.json")
GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "speed_and_memory.md").read_text(encoding="utf-8")


def table_lines(text: str) -> list[str]:
    """Lines of a plan's table, as numbers and words."""
    return [
        " ".join(line.split())
        for line in text.splitlines()
        if re.search(r"\d (left|missing)(, .* to load a step)?$", line.strip())
    ]


@pytest.mark.slow
def test_the_help_and_the_guide_show_real_output(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["plan", LLAMA_3_8B, "--gpu-memory", "24GB"])
    printed = table_lines(capsys.readouterr().out)
    assert len(printed) > 20
    for text in (command.__doc__ or "", GUIDE):
        shown = table_lines(text)
        assert len(shown) >= 8
        assert not set(shown) - set(printed)


def test_many_rows_in_a_pass_stay_apart_from_the_weights_that_move() -> None:
    row = Row(Setup("full", "half"), "bfloat16", 8_030_000_000, 0, 0, 0, 0, 0, (16384,))
    printed = command.text(Plan("opt", 1, Assumptions(batch_size=128, num_directions=64), (row,)))
    assert "8.0B 1 x 16384 " in printed
    assert "full and scales: all 128 probes in one forward pass" in printed
    assert "a step: 128 probes, one after another (a CPU takes --in-one-pass)" in printed


def test_every_assumption_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = tmp_path / "config.json"
    tiny.write_text(
        '{"model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2,'
        '"vocab_size": 99, "word_embed_proj_dim": 32, "max_position_embeddings": 64}'
    )
    options = [
        "--batch-size",
        "3",
        "--sequence-length",
        "17",
        "--labels",
        "all",
        "--no-padding",
        "--attention",
        "eager",
    ]
    options += [
        "--rows-per-direction",
        "0",
        "--num-directions",
        "2",
        "--rank",
        "5",
        "--lora-rank",
        "6",
        "--lora-targets",
        "q_proj",
    ]
    options += ["--optimizer", "adamw", "--direction", "rademacher", "--dtype", "float16", "--overhead", "0"]
    cli.main(["plan", str(tiny), "--gpu-memory", "1MB", *options])
    printed = capsys.readouterr().out
    for words in (
        *("3 rows of 17 tokens", "without a mask", "every position", "all 4 probes in one", "4 times the activations"),
        *("2 rademacher", "rank 5", "optimizer adamw", "attention: eager", "rank 6 on q_proj", "float16", "0.0 GB"),
    ):
        assert words in printed


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nobody/nothing"], "model='nobody/nothing' has no readable config"),
        ([LLAMA_3_8B, "--gpu-memory", "lots"], "gpu_memory='lots' is not a size"),
        ([LLAMA_3_8B, "--overhead", "some"], "--overhead 'some' is not a size"),
        ([LLAMA_3_8B, "--labels", "few"], "--labels 'few' is not a number"),
        ([LLAMA_3_8B, "--rank", "0"], "rank=0 must be at least 1"),
    ],
    ids=["model", "memory", "overhead", "labels", "rank"],
)
def test_a_wrong_command_line_is_answered_in_one_sentence(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", *argv])
    assert says in capsys.readouterr().err
