"""Options of a command line are spelled out, given once, and have a value."""

from __future__ import annotations

import pytest

from zo_hf.tasks.command_line import CommandParser


def parser() -> CommandParser:
    made = CommandParser(prog="tool")
    made.add_argument("--learning_rate", "--learning-rate", type=float)
    made.add_argument("--words", nargs="+")
    made.add_argument("--offline", action="store_true")
    made.add_argument("--run", action="append")
    made.add_argument("texts", nargs="*")
    return made


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--learning", "1"], "there is no option --learning; write --learning_rate in full."),
        (["--learnin_rate=1"], "there is no option --learnin_rate; write --learning_rate if you mean that."),
        (["--xyz"], "there is no option --xyz; --help lists the options."),
        (["--offline", "--offline"], "--offline is given twice; give it once."),
        (["--learning_rate", "1", "--learning-rate", "2"], "--learning-rate is given twice; give it once."),
        (["--learning_rate", ""], "--learning_rate has an empty value; give one, or leave the option out."),
        (["--words="], "--words has an empty value; give one, or leave the option out."),
        (["--learning_rate", "x"], "--learning_rate/--learning-rate: invalid float value: 'x'; --help describes"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parser().parse_args(words)
    assert end.value.code == 2 and f"tool: error: {sentence}" in capsys.readouterr().err


def test_values_that_look_like_options_are_values() -> None:
    args = parser().parse_args(
        ["--learning_rate", "-1", "--run", "a", "--run", "b", "- or not", "", "--", "--offline"]
    )
    assert (args.learning_rate, args.run, args.offline) == (-1.0, ["a", "b"], False)
    assert args.texts == ["- or not", "", "--offline"]
