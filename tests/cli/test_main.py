import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from zo_hf.cli import main as cli


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name, "Says how a command works.\n\n    as it is written")
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        cli.main(argv)
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown and command.summary in shown for name, command in cli.COMMANDS.items())


def test_help_imports_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "import_module", lambda name: pytest.fail(f"imported {name}"))
    cli.main(["--help"])


def test_the_options_of_a_command_need_no_torch_unless_they_are_made_from_methods() -> None:
    """Also the refusal of a wrong option, which comes before any work."""
    script = """
import sys
from zo_hf.cli.main import main
for name in ("predict", "chat", "replay", "methods"):
    for argv in ([name, "--help"], [name, "--nope"]):
        try:
            main(argv)
        except SystemExit:
            pass
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.endswith("[]\n") and ended.stderr.count("there is no option --nope") == 4


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["fly"])
    assert exit_info.value.code == 2
    assert "'fly' is not a command; use one of train, sft, predict" in capsys.readouterr().err


def test_train_gets_its_command_line_unparsed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fake_module(monkeypatch, "zo_hf.tasks.sentiment_job", main=lambda argv, prog: calls.append((argv, prog)))
    cli.main(["train", "--offline", "--max_steps", "3"])
    assert calls == [(["--offline", "--max_steps", "3"], "zo-hf train")]


def test_a_command_with_arguments_is_parsed_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    fake_module(
        monkeypatch, "zo_hf.cli.bench", add_arguments=lambda parser: parser.add_argument("--size"), run=ran.append
    )
    cli.main(["bench", "--size", "7"])
    assert ran[0].size == "7"


def test_the_help_of_a_command_is_its_docstring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_module(monkeypatch, "zo_hf.cli.bench", add_arguments=lambda parser: None, run=None)
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    assert "Says how a command works.\n\n    as it is written" in capsys.readouterr().out


def test_predict_without_a_prompt_says_which_folder_to_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["predict", str(tmp_path), "a film"])
    assert exit_info.value.code == 2
    assert "has no prompt.json; name the output folder" in capsys.readouterr().err
