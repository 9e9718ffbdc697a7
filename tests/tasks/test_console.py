"""Output of a command never ends its work, and Ctrl-C is one sentence."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys

import pytest

from zo_hf.tasks.console import BROKEN_PIPE, INTERRUPTED, LastingStream, command, plain


class Broken(io.StringIO):
    """A stream without a descriptor that fails on writing."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code"),
    [(BrokenPipeError(), BROKEN_PIPE), (OSError(errno.ENOSPC, "No space"), 1), (ValueError("closed"), 1)],
)
@pytest.mark.parametrize("end", [None, 0, 2])
def test_the_work_is_finished_without_its_output(
    error: Exception, code: int, end: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(error))
    done = []
    with pytest.raises(SystemExit) as exit_info, command():
        print("first")
        done.append("work")
        print("second", flush=True)
        if end is not None:
            raise SystemExit(end)
    assert done == ["work"] and exit_info.value.code == (end or code)
    assert isinstance(sys.stdout, Broken)


def test_standard_error_may_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Broken(BrokenPipeError()))
    done = []
    with command():
        print("a warning", file=sys.stderr)
        done.append("work")
    assert done == ["work"] and isinstance(sys.stderr, Broken)


def test_missing_streams_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with command():
        print("nothing")
        sys.stderr.write("nothing")
    assert sys.stdout is None


def test_a_terminal_without_unicode_gets_plain_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii"))
    with command():
        print("½·δ² of 10⁹ ± ε → é 好")
    assert content.getvalue() == b"1/2*delta^2 of 10^9 +- epsilon -> e \\u597d\n"


def test_every_character_has_a_plain_form() -> None:
    for code in range(0x3000):
        letter = chr(code)
        assert plain(letter).isascii() and (plain(letter) or letter)


def test_an_interruption_says_what_was_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info, command(), command(lambda: "half of it is kept"):
        os.kill(os.getpid(), signal.SIGINT)
    assert exit_info.value.code == INTERRUPTED
    assert capsys.readouterr().err == "\ninterrupted: half of it is kept.\n"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/model.safetensors"),
        RuntimeError(f"Error while serializing: {os.strerror(errno.ENOSPC)} (os error 28)"),
    ],
    ids=["system", "library"],
)
def test_a_full_disk_is_one_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info, command():
        raise error
    said = capsys.readouterr().err
    assert exit_info.value.code == 1 and said.startswith("error: a") and said.count("\n") == 1
    assert "No space left on device" in said


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(KeyError), command():
        raise KeyError("a bug")


def test_it_is_the_stream_below_otherwise() -> None:
    below = io.StringIO()
    stream = LastingStream(below)
    assert stream.write("abc") == 3 and stream.getvalue() == "abc" and not stream.isatty()
