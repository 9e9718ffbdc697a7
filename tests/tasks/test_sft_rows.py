"""Files of chats and instructions: three formats are read, and what is wrong is said in one sentence that names the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_hf.tasks.chat_rows import check_same_format, read_rows, split_rows
from zo_hf.tasks.sft_task import INSTRUCTIONS

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "content", "columns", "is_chat"),
    [
        ("a.jsonl", lines({"messages": [USER, ASSISTANT], "id": 7}), ("messages",), True),
        ("a.jsonl", lines({"prompt": [USER], "completion": [ASSISTANT]}), ("prompt", "completion"), True),
        ("a.jsonl", b'\xef\xbb\xbf\n{"prompt": "", "completion": "a\\u2028b"}\r\n', ("prompt", "completion"), False),
        ("a.JSON", json.dumps([{"text": "a"}]).encode(), ("text",), False),
        ("a.csv", b'prompt,completion\n"a, b","c\nd"\n', ("prompt", "completion"), False),
        ("a.tsv", b"id\ttext\n1\ta b\n", ("text",), False),
    ],
)
def test_formats_are_told_by_their_columns(
    tmp_path: Path, name: str, content: bytes, columns: tuple[str, ...], is_chat: bool
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    rows = read_rows("--train_file", path)
    assert (rows.columns, rows.is_chat) == (columns, is_chat)
    assert [tuple(row) for row in rows.rows] == [columns]


WRONG = {
    "empty": (b"", "has no rows"),
    "blank": (b"\n \n", "has no rows"),
    "binary": (b"\x89PNG\r\n\x1a\n\xff", "is not text in UTF-8"),
    "zeros": (b"\0\0\0", "holds zero bytes"),
    "no JSON": (b'{"text": "a"}\n{"text": \n', "row 2, is not valid JSON"),
    "nested": (b"[" * 100_000, "is nested too deeply"),
    "a list": (lines(["a"]), "row 1, is .*, not an object"),
    "wrong columns": (lines({"question": "a", "answer": "b"}), "has the columns question, answer; name the columns"),
    "no columns": (lines({}), "has the columns none"),
    "half a format": (lines({"prompt": "a"}), "has the columns prompt;"),
    "another name": (lines({"conversations": [{"from": "human", "value": "a"}]}), "rename it to `messages`"),
    "two formats": (lines({"prompt": "a", "completion": "b", "text": "c"}), "which are two formats"),
    "mixed": (
        lines({"text": "a"}, {"prompt": "a", "completion": "b"}),
        "row 2, has prompt and completion, and .* text",
    ),
    "mixed kinds": (
        lines({"prompt": "a", "completion": "b"}, {"prompt": [USER], "completion": [ASSISTANT]}),
        "of messages",
    ),
    "mixed within": (lines({"prompt": [USER], "completion": "b"}), "completion: b is not a list of messages"),
    "number": (lines({"text": 3}), "text: 3 is not a text"),
    "list": (lines({"text": ["a"]}), "text: .* is not a text"),
    "null": (lines({"prompt": "a", "completion": None}), "completion: .* is not a text"),
    "blank text": (lines({"text": " "}), "text: it is empty"),
    "messages are text": (lines({"messages": "hi"}), "messages: hi is not a list of messages"),
    "no messages": (lines({"messages": []}), "is not a list of messages"),
    "no role": (lines({"messages": [{"content": "a"}]}), "give every message a `role` and a `content`"),
    "no content": (lines({"messages": [{"role": "user"}]}), "give every message a `role` and a `content`"),
    "message is text": (lines({"messages": ["hi"]}), "a message is hi"),
    "unknown role": (lines({"messages": [{"role": "bot", "content": "a"}]}), "a role bot; use one of system, user"),
    "role is a list": (lines({"messages": [{"role": ["user"], "content": "a"}]}), "there is a role"),
    "content of parts": (
        lines({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        "a content is .*; give a text",
    ),
    "empty answer": (lines({"messages": [USER, ASSISTANT | {"content": ""}]}), "an answer of the assistant is empty"),
    "tools": (lines({"messages": [USER, ASSISTANT | {"tool_calls": [{}]}]}), "calls tools"),
    "surrogate": (b'{"text": "\\ud800"}', "half of a surrogate pair"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_one_sentence_that_names_it(tmp_path: Path, kind: str) -> None:
    content, message = WRONG[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_rows("--train_file", path)
    text = str(error.value)
    assert text.startswith(f"--train_file {path}") and text.endswith(".") and "\n" not in text and "; " in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"hi", "none of the endings"),
        ("a.json", b'{"text": "a"}', "is not a list of rows"),
        ("a.csv", b"prompt,completion\na\n", "row 1, has 1 values for 2 columns"),
        ("a.csv", b'text\n"a"b\n', "is not a table"),
        ("a.csv", b"text\n", "has no rows"),
        ("a.csv", b"text,text\na,b\n", "has a column twice"),
    ],
)
def test_wrong_tables(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows("--eval_file", tmp_path / name)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("none.jsonl", "folder.jsonl"):
        with pytest.raises(ValueError, match="does not exist or is not a plain file"):
            read_rows("--train_file", tmp_path / name)


def test_files_of_two_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "a"}))
    (tmp_path / "b.jsonl").write_bytes(lines({"messages": [USER]}))
    train, other = (read_rows("--x", tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(ValueError, match=r"^--eval_file .*has rows of messages, and --train_file has text"):
        check_same_format(other, train)
    check_same_format(train, train)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.floats(0.01, 0.99), st.integers(0, 3))
def test_no_held_out_row_is_trained_on(texts: list[int], fraction: float, seed: int) -> None:
    rows = read_rows("--train_file", INSTRUCTIONS)
    rows = type(rows)("a", ("text",), False, [{"text": str(text)} for text in texts])
    if len(set(texts)) <= max(1, round(fraction * len(set(texts)))):
        with pytest.raises(ValueError, match="leaves none to train on"):
            split_rows(rows, fraction, seed)
        return
    train, held_out = split_rows(rows, fraction, seed)
    assert held_out is not None and held_out.rows and train.rows
    assert sorted(row["text"] for row in (*train.rows, *held_out.rows)) == sorted(map(str, texts))
    assert not {row["text"] for row in train.rows} & {row["text"] for row in held_out.rows}
    assert split_rows(rows, fraction, seed) == (train, held_out)


def test_the_embedded_instructions_are_right() -> None:
    rows = read_rows("--train_file", INSTRUCTIONS)
    units = {"kilometers": 1000, "hours": 60, "minutes": 60, "kilograms": 1000, "liters": 1000, "days": 24}
    units |= {"weeks": 7, "years": 12, "feet": 12, "yards": 3, "centimeters": 10, "meters": 100}
    assert rows.is_chat and len(rows.rows) == 156 and INSTRUCTIONS.stat().st_size < 100_000
    for row in rows.rows:
        ((question,), (reply,)) = row["prompt"], row["completion"]
        answer = json.loads(reply["content"])
        words = question["content"].rstrip(".?").split()
        number = next(word for word in words if word.isdecimal())
        unit = words[words.index(number) + 1]
        assert answer == {"value": int(number) * units[unit], "unit": answer["unit"]} and answer["unit"] in words
