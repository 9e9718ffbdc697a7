"""JSON of a bounded size: numbers of 64 bits, no key twice, and not more nesting than a file of ours has."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

MAX_BYTES = 16 << 20
# Every list and object takes tens of bytes more than its text, so their number bounds the memory.
MAX_CONTAINERS = 1 << 18
MAX_DEPTH = 16


def parse(text: bytes, finite: bool = True) -> Any:
    """Return the content of a JSON text.

    Args:
        text: the text, UTF-8.
        finite: refuse numbers that are not finite, which Python writes as `NaN` and `Infinity`.

    Raises:
        ValueError: the text is too long, is not JSON, or holds what no file of ours holds; the message gives the reason
            as a clause.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    if text.count(b"[") + text.count(b"{") > MAX_CONTAINERS:
        raise ValueError(f"it holds more than {MAX_CONTAINERS} lists and objects")
    try:
        content = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object,
            parse_float=_finite if finite else float,
            parse_int=_integer,
            parse_constant=_finite if finite else float,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError("it is not valid JSON") from error
    if _depth_exceeds(content, MAX_DEPTH):
        raise ValueError("it is nested too deeply")
    return content


def read(path: Path, finite: bool = True) -> Any:
    """Return the content of a JSON file; the arguments are those of `parse`.

    Raises:
        OSError: the file cannot be read, or is no plain file, such as a pipe that would never end.
        ValueError: see `parse`.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a plain file")
    with path.open("rb") as file:
        return parse(file.read(MAX_BYTES + 1), finite)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("it names an entry twice")
    return content


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("it holds a number that is not finite")
    return value


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 20 else 1 << 64
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError("it holds a number of more than 64 bits")
    return value


def _depth_exceeds(content: Any, limit: int) -> bool:
    if not isinstance(content, dict | list):
        return False
    inner = content.values() if isinstance(content, dict) else content
    return limit == 0 or any(_depth_exceeds(item, limit - 1) for item in inner)
