"""A command and its terminal: output that cannot end the work, plain characters where there are no others, and Ctrl-C.

A reader that has gone (`| head -1`), a full disk and a terminal without Unicode are troubles of the output alone. The work
goes on without it, and the exit code tells at the end.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: Exit codes, as a shell reports the death by SIGPIPE and by SIGINT.
BROKEN_PIPE, INTERRUPTED = 141, 130

#: Errors of a disk that no argument of the command can be blamed for before it is written to.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
_PLAIN = {"½": "1/2", "·": "*", "×": "x", "–": "-", "—": "-", "…": "...", "≤": "<=", "≥": ">=", "±": "+-", "→": "->"}
_PLAIN |= {"√": "sqrt", "∞": "inf", "‘": "'", "’": "'", "“": '"', "”": '"', "∇": "grad ", "′": "'", "≈": "~", "−": "-"}


class LastingStream:
    """A text stream that drops what cannot be written, instead of raising.

    Args:
        stream: the stream below.

    Attributes:
        error: the first error; None while all is well.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        self._try(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, action: Callable[..., Any], *args: Any) -> None:
        if self.error is not None:
            return
        try:
            action(*args)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.error = error
            self._give_up()

    def _give_up(self) -> None:
        """Let the end of the program flush the rest into nothing, which would fail a second time."""
        try:
            number = self.stream.fileno()
        except (OSError, ValueError):
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


@contextmanager
def command(kept: Callable[[], str] = lambda: "nothing was saved") -> Iterator[None]:
    """Enter a context in which a command runs.

    Neither standard output nor standard error can end it. Ctrl-C and a full disk end it with one sentence. Inside another
    such context only the sentences are its own.

    Args:
        kept: returns, after Ctrl-C, what the work so far has left behind.
    """
    if isinstance(sys.stdout, LastingStream):
        with _one_sentence(kept):
            yield
        return
    before = sys.stdout, sys.stderr
    _open_missing_descriptors()
    out, errors = sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    try:
        with _one_sentence(kept):
            yield
    except SystemExit as end:
        out.flush()
        if end.code or out.error is None:
            raise
    finally:
        out.flush()
        errors.flush()
        sys.stdout, sys.stderr = before
    if out.error is not None:
        _end_without_output(out.error)


@contextmanager
def _one_sentence(kept: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\ninterrupted: {kept()}.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        print(f"error: {reason}; free some space, or write to another place.", file=sys.stderr)
        raise SystemExit(1) from error


def is_of_a_disk(error: OSError) -> bool:
    """Return whether a disk has refused to be written to."""
    return error.errno in _DISK


def _disk_error(error: Exception) -> str | None:
    """Return what a disk has refused, or None if the error is another one."""
    if isinstance(error, OSError) and is_of_a_disk(error):
        return f"{error.filename or 'a file'} cannot be written ({error.strerror})"
    # safetensors and torch raise errors of their own, with the system's words.
    words = next((os.strerror(number) for number in _DISK if os.strerror(number) in str(error)), None)
    return None if words is None else f"a file cannot be written ({words})"


def _end_without_output(error: Exception) -> None:
    if isinstance(error, BrokenPipeError):
        raise SystemExit(BROKEN_PIPE)
    reason = error.strerror if isinstance(error, OSError) else error
    print(f"error: standard output cannot be written ({reason}); the work is done.", file=_lasting(sys.stderr))
    raise SystemExit(1)


def _open_missing_descriptors() -> None:
    """Open standard streams that the caller has closed, so that no file of the work gets their numbers."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)


def _lasting(stream: Any) -> LastingStream:
    """Wrap a stream; None, which Python has for a closed one, becomes a stream into nothing."""
    if stream is None:
        stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="zo_hf.plain")
    return LastingStream(stream)


def plain(text: str) -> str:
    """Return a text in ASCII: signs as words, superscripts after a caret, other characters as their escapes."""
    return "".join(letter if letter.isascii() else _plain_letter(letter) for letter in text)


def _plain_letter(letter: str) -> str:
    if letter in _PLAIN:
        return _PLAIN[letter]
    parts = unicodedata.normalize("NFKD", letter)
    base = "".join(part for part in parts if part.isascii())
    if unicodedata.decomposition(letter).startswith("<super>") and base:
        return f"^{base}"
    if base:
        return base
    name = unicodedata.name(letter, "")
    if name.startswith("GREEK SMALL LETTER ") or name.startswith("GREEK CAPITAL LETTER "):
        word = name.split()[3].lower()
        return word if "SMALL" in name else word.capitalize()
    return letter.encode("ascii", "backslashreplace").decode()


def _plain_error(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return plain(error.object[error.start : error.end]), error.end


codecs.register_error("zo_hf.plain", _plain_error)
