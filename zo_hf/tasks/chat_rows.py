"""Rows of chats and instructions in a local file, in TRL's formats: messages, prompt and completion, or text."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zo_hf.untrusted.fields import shown

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
ROLES = ("system", "user", "assistant", "tool")
FORMATS = "`messages`, `prompt` and `completion`, or `text`"


@dataclass(frozen=True)
class ChatRows:
    """Rows of one format.

    Attributes:
        name: the file, or the source in words.
        columns: the columns of the format: ("messages",), ("prompt", "completion"), or the column of plain text.
        is_chat: whether the columns hold messages, each with `role` and `content`, rather than strings.
        rows: the rows, with these columns alone.
    """

    name: str
    columns: tuple[str, ...]
    is_chat: bool
    rows: list[dict[str, Any]]

    @property
    def in_words(self) -> str:
        """The format in words."""
        return " and ".join(self.columns) + (" of messages" if self.is_chat and len(self.columns) == 2 else "")


def read_rows(option: str, path: Path, text_column: str = "text") -> ChatRows:
    """Read and check a file.

    Args:
        option: the option that names the file, for the messages.
        path: a file ending in .jsonl, .json, .csv or .tsv.
        text_column: the column of plain text.

    Raises:
        ValueError: the file cannot be read, has no rows, or has rows of no format or of two; the message names the row.
    """
    what = f"{option} {path}"
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{what} has none of the endings {', '.join(SUFFIXES)}; give such a file.")
    if not path.is_file():
        raise ValueError(f"{what} does not exist or is not a plain file; give the path of a file with one row a line.")
    rows: list[dict[str, Any]] = []
    kind: tuple[tuple[str, ...], bool] | None = None
    for number, row in _records(what, path):
        where = f"{what}, row {number},"
        columns = _columns_of(where, row, text_column)
        values = {name: row[name] for name in columns}
        is_prompt_of_messages = "prompt" in columns and isinstance(values["prompt"], list)
        row_kind = columns, columns == ("messages",) or is_prompt_of_messages
        kind = row_kind if kind is None else kind
        if row_kind != kind:
            first, other = (ChatRows("", *each, []).in_words for each in (kind, row_kind))
            raise ValueError(
                f"{where} has {other}, and rows before it have {first}; put each format in a separate file."
            )
        _check_values(where, values, kind[1])
        rows.append(
            {name: [_plain(message) for message in value] if kind[1] else value for name, value in values.items()}
        )
    if kind is None:
        raise ValueError(f"{what} has no rows; give a file with rows of {FORMATS}.")
    return ChatRows(str(path), *kind, rows)


def check_same_format(rows: ChatRows, train: ChatRows) -> None:
    """Raise a ValueError if the rows of --eval_file have another format than those to train on."""
    if (rows.columns, rows.is_chat) != (train.columns, train.is_chat):
        raise ValueError(
            f"--eval_file {rows.name} has rows of {rows.in_words}, and --train_file has {train.in_words}; give both the same."
        )


def split_rows(rows: ChatRows, fraction: float, seed: int) -> tuple[ChatRows, ChatRows | None]:
    """Hold a part of the rows out, drawn by `seed`: at least one, and none that also stays in the other part.

    Raises:
        ValueError: a part would be empty.
    """
    if not fraction:
        return rows, None
    keys = [json.dumps(row, sort_keys=True) for row in rows.rows]
    different = sorted(set(keys))
    random.Random(seed).shuffle(different)
    held_out = set(different[: max(1, round(fraction * len(different)))])
    if len(held_out) == len(different):
        raise ValueError(
            f"{rows.name} has {len(different)} different rows, and --eval_fraction {fraction:g} leaves none to train on; "
            "add rows, or hold none out with --eval_fraction 0."
        )
    parts = [
        [row for row, key in zip(rows.rows, keys, strict=True) if (key in held_out) == out] for out in (False, True)
    ]
    return replace(rows, rows=parts[0]), replace(rows, rows=parts[1])


def _records(what: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file, each with its number, from 1."""
    suffix, text = path.suffix.lower(), _text(what, path)
    if suffix in (".csv", ".tsv"):
        yield from _table(what, text, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".json":
        content = _json(what, text)
        if not isinstance(content, list):
            raise ValueError(f"{what} is not a list of rows; write `[{{...}}, {{...}}]`, or one row a line as .jsonl.")
        for number, row in enumerate(content, 1):
            yield number, _object(f"{what}, row {number},", row)
    else:
        # Not splitlines, which also breaks at characters that JSON may hold inside a string.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{what}, row {number},"
                yield number, _object(where, _json(where, line))


def _text(what: str, path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not text in UTF-8 (byte {error.start}); write it in UTF-8.") from error
    except OSError as error:
        raise ValueError(f"{what} cannot be read ({error.strerror}); give a file that you may read.") from error
    if "\0" in text:
        raise ValueError(f"{what} holds zero bytes, so it is not text; give a text file with rows of {FORMATS}.")
    return text


def _table(what: str, text: str, separator: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{what} is not a table ({error}); put quotes around a value with a quote or a comma."
        ) from error
    names = lines[0] if lines else []
    if len(set(names)) < len(names):
        raise ValueError(
            f"{what} has a column twice among {', '.join(map(shown, names))}; give each a different name."
        )
    for number, line in enumerate(lines[1:], 1):
        if not line:
            continue
        if len(line) != len(names):
            raise ValueError(
                f"{what}, row {number}, has {len(line)} values for {len(names)} columns; put quotes around a value with a "
                "comma or a line break."
            )
        yield number, dict(zip(names, line, strict=True))


def _json(what: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{what} is not valid JSON ({reason}); write one JSON object a row.") from error


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f'{where} is {shown(row)}, not an object; write a row as `{{"text": "..."}}`.')
    return row


def _columns_of(where: str, row: dict[str, Any], text_column: str) -> tuple[str, ...]:
    known = (("messages",), ("prompt", "completion"), (text_column,))
    found = [columns for columns in known if set(columns) <= row.keys()]
    if len(found) > 1:
        raise ValueError(f"{where} has {' and '.join(sum(found, ()))}, which are two formats; keep one of them.")
    if found:
        return found[0]
    names = ", ".join(shown(name) for name in list(row)[:6]) or "none"
    advice = f"name the columns {FORMATS}"
    if "conversations" in row:
        advice = "rename it to `messages`, with `role` (user, assistant) and `content` in every message"
    raise ValueError(f"{where} has the columns {names}; {advice}.")


def _check_values(where: str, values: dict[str, Any], is_chat: bool) -> None:
    for name, value in values.items():
        if is_chat:
            _check_messages(f"{where} {name}:", value)
        elif not isinstance(value, str):
            raise ValueError(f"{where} {name}: {shown(value)} is not a text; give a text, as in the rows before.")
        elif not value.strip() and name != "prompt":
            raise ValueError(f"{where} {name}: it is empty; leave the row out, or fill it.")
        else:
            _check_encodes(f"{where} {name}:", value)


def _check_messages(where: str, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{where} {shown(messages)} is not a list of messages; give at least one with role and content."
        )
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where} a message is {shown(message)}; give every message a `role` and a `content`.")
        if message["role"] not in ROLES:
            raise ValueError(f"{where} there is a role {shown(message['role'])}; use one of {', '.join(ROLES)}.")
        if message.get("tool_calls"):
            raise ValueError(
                f"{where} a message calls tools; write the call as content, or train with zo_hf.trl.ZOSFTTrainer."
            )
        if not isinstance(message["content"], str):
            raise ValueError(f"{where} a content is {shown(message['content'])}; give a text.")
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"{where} an answer of the assistant is empty; leave the row out, or fill it.")
        _check_encodes(where, message["content"])


def _check_encodes(where: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} it holds half of a surrogate pair, which is not a character; correct the text."
        ) from error


def _plain(message: dict[str, Any]) -> dict[str, str]:
    """The parts of a message that every chat template reads; the columns of a data set need the same keys in every row."""
    return {"role": message["role"], "content": message["content"]}
