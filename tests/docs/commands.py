"""Commands in the documentation: parsed by whoever would run them, and not run."""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from common import vllm_server
from transformers import HfArgumentParser

from tests.docs.pages import ROOT
from zo_hf.cli import main as cli

#: Not ours to check.
OTHERS = ("pip", "docker", "torchrun")


class Parsed(BaseException):
    """Raised in place of what comes after the arguments were read; not an Exception, which a command may catch."""


def words_of(text: str) -> list[list[str]]:
    """The commands of a block, with its variables filled in and without comments."""
    commands, variables = [], dict[str, str]()
    for line in re.sub(r"\\\n\s*", "", text).split("\n"):
        for name, value in variables.items():
            line = re.sub(rf"\$\{{?{name}\b\}}?", value, line)
        words = shlex.split(line, comments=True)
        assigned = [word for word in words if re.fullmatch(r"[A-Z_]+=.*", word)]
        if assigned == words:
            variables |= dict(word.split("=", 1) for word in assigned)
        else:
            commands.append(words[next(i for i, word in enumerate(words) if word not in assigned) :])
    return commands


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a command's own parser read it.

    Raises:
        AssertionError: it cannot; or the command is unknown here.
    """
    program, *arguments = words
    if program == "zo-hf":
        _parse(monkeypatch, lambda: cli.main(arguments))
    elif program in ("python", "python3") and arguments[0] == "run.py":
        _check_run(arguments[1:], monkeypatch)
    elif program in ("python", "python3") and arguments[:2] == ["-m", "pytest"]:
        assert (ROOT / arguments[2]).exists(), f"there is no {arguments[2]}"
    elif program in ("python", "python3"):
        _check_script(arguments, monkeypatch)
    elif program == "accelerate":
        assert arguments[0] == "launch", "accelerate has other commands, that are not checked here"
        with _no_exit():
            launch = launch_command_parser().parse_args(arguments[1:])
        assert launch.config_file is None or (ROOT / launch.config_file).is_file(), launch.config_file
        _check_script([launch.training_script, *launch.training_script_args], monkeypatch)
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file(), f"there is no {arguments[0]}"
    else:
        assert program in OTHERS, f"{program!r} is not checked here: mark its block as not run, and say why"


def _check_run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = _module(ROOT / "run.py")
    known = re.findall(r"^    python3 run\.py (\w+)", run.__doc__ or "", re.MULTILINE)
    command, *rest = arguments
    assert command in known, f"run.py has no command {command!r}"
    if command == "demo":
        _check_script([run.RECIPE, "--offline", *rest], monkeypatch)
    elif command == "launch":
        _check_script(rest, monkeypatch)
    elif command == "install":
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
        assert set(rest) <= set(re.findall(r"^(\w+) = \[$", project, re.MULTILINE))
    elif command == "serve":
        vllm_server.requested(rest)
    elif command == "docs":
        assert rest in ([], ["--serve"])
    elif command == "check":
        assert not rest


def _check_script(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / arguments[0]
    assert script.is_file(), f"there is no {arguments[0]}"
    with monkeypatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [str(script), *arguments[1:]])
        patch.syspath_prepend(str(script.parent))
        _parse(monkeypatch, lambda: runpy.run_path(str(script), run_name="__main__"))


def _parse(monkeypatch: pytest.MonkeyPatch, start: Callable[[], Any]) -> None:
    """Start a command and stop it once it has read its arguments."""

    def then_stop(method: Any) -> Any:
        def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
            found = method(self, *args, **kwargs)
            if method.__name__ == "parse_args" and isinstance(self, HfArgumentParser):
                return found  # whose dataclasses, made next, have checks of their own
            raise Parsed

        return parse

    with monkeypatch.context() as patch, _no_exit(), pytest.raises(Parsed):
        for kind, name in (
            (argparse.ArgumentParser, "parse_args"),
            (HfArgumentParser, "parse_args_into_dataclasses"),
            (HfArgumentParser, "parse_dict"),
        ):
            patch.setattr(kind, name, then_stop(getattr(kind, name)))
        start()


@contextmanager
def _no_exit() -> Iterator[None]:
    try:
        yield
    except SystemExit as end:
        raise AssertionError(f"the parser refuses it ({end}); its message is in stderr") from end


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
