"""Answers of a server are untrusted: whatever is not as asked for is refused, with the reason as a clause."""

from __future__ import annotations

import json
from typing import Any

import pytest

from zo_hf.serving.answers import base_model, completions, log_probabilities, message_of
from zo_hf.serving.client import Server, _parts
from zo_hf.serving.errors import BadAnswer
from zo_hf.untrusted import plain_json

ROWS = [[5, 6, 7], [8, 9]]


def right() -> dict[str, Any]:
    def entry(token: int) -> dict[str, Any]:
        return {str(token): {"logprob": -token / 10, "rank": 3, "decoded_token": "x"}}

    return {
        "choices": [
            {"index": 1, "prompt_logprobs": [None, entry(9)], "token_ids": [1]},
            {"index": 0, "prompt_logprobs": [None, entry(6), entry(7)], "token_ids": [2, 3]},
        ]
    }


def test_the_order_is_that_of_the_prompts() -> None:
    assert log_probabilities(right(), ROWS) == [[-0.6, -0.7], [-0.9]]
    assert completions(right(), 2, longest=2, vocabulary=4) == [[2, 3], [1]]


def changed(path: str, value: Any) -> Any:
    """The right answer with another value at a path of keys."""
    answer: Any = right()
    *way, last = [int(key) if key.isdecimal() and key != "9" else key for key in path.split(".")]
    inner = answer
    for key in way:
        inner = inner[key]
    inner[last] = value
    return answer


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {},
        {"choices": None},
        {"choices": [1, 2]},
        {"choices": right()["choices"][:1]},
        {"choices": right()["choices"] * 2},
        changed("choices.0.index", 0),
        changed("choices.0.index", 2),
        changed("choices.0.index", True),
        changed("choices.0.prompt_logprobs", None),
        changed("choices.0.prompt_logprobs", [None]),
        changed("choices.0.prompt_logprobs.1", None),
        changed("choices.0.prompt_logprobs.1", {"8": {"logprob": -1.0}}),
        changed("choices.0.prompt_logprobs.1.9", -1.0),
        changed("choices.0.prompt_logprobs.1.9", {"logprob": "-1"}),
        changed("choices.0.prompt_logprobs.1.9", {"logprob": 1.0}),
        changed("choices.0.prompt_logprobs.1.9", {"logprob": -1e308}),
        changed("choices.0.prompt_logprobs.1.9", {"logprob": float("nan")}),
        changed("choices.0.prompt_logprobs.1.9", {"logprob": True}),
    ],
    ids=repr,
)
def test_wrong_log_probabilities(answer: Any) -> None:
    with pytest.raises(BadAnswer):
        log_probabilities(answer, ROWS)


@pytest.mark.parametrize("tokens", [None, "12", [1, 2, 3], [4], [-1], [1.0], [True]], ids=repr)
def test_wrong_completions(tokens: Any) -> None:
    with pytest.raises(BadAnswer, match="token_ids"):
        completions(changed("choices.0.token_ids", tokens), 2, longest=2, vocabulary=4)


@pytest.mark.parametrize(
    "answer",
    [None, {"data": []}, {"data": [1]}, {"data": [{"id": 5}]}, {"data": [{"id": "a", "parent": "b"}]}]
    + [{"data": [{"id": "a", "max_model_len": size}]} for size in (0, -1, "8", True)],
    ids=repr,
)
def test_wrong_lists_of_models(answer: Any) -> None:
    with pytest.raises(BadAnswer):
        base_model(answer)


def test_the_base_model_is_no_adapter() -> None:
    cards = [{"id": "adapter", "parent": "base"}, {"id": "base", "parent": None, "max_model_len": 9}]
    assert (base_model({"data": cards}).name, base_model({"data": cards}).longest) == ("base", 9)


def test_messages_are_short_and_printable() -> None:
    assert message_of({"error": {"message": "rank\n16 is\ttoo high."}}) == "rank 16 is too high"
    assert len(message_of({"error": {"message": "x" * 4000}})) < 300
    assert message_of({"error": {"message": "\x1b[31m"}}).isprintable()
    assert message_of({"error": 5}) == message_of(None) == "no message"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": NaN}', "not finite"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"[" * 100, "nested|JSON"),
        (b"[" + b"[]," * (1 << 18) + b"[]]", "lists and objects"),
    ],
    ids=["NaN", "twice", "deep", "many"],
)
def test_texts_that_no_answer_has(text: bytes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server("http://127.0.0.1:1", 1.0)
    monkeypatch.setattr(server, "_ask", lambda *_: (200, text))
    with pytest.raises(BadAnswer, match=reason):
        server.base()


def test_requests_have_a_bounded_size() -> None:
    rows = [[1] * 9000, [2] * 9000, [3] * 20000, [4], [5]]
    assert [[len(row) for row in part] for part in _parts(rows)] == [[9000], [9000], [20000], [1, 1]]
    assert _parts([]) == []
    # A token takes well below the bytes that such an answer may have.
    entry = {"42": {"logprob": -12.345678901234567, "rank": 49152, "decoded_token": "\\ud83d" * 8}}
    assert len(json.dumps(entry)) * (1 << 14) < plain_json.MAX_BYTES


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://a", "http://", "http://a:port", "http://a/?x=1", "http://a/#x", "http://a:70000"],
)
def test_wrong_addresses(url: str) -> None:
    with pytest.raises(ValueError, match=r"is not the address of a server; give one such as"):
        Server(url, 1.0)


@pytest.mark.parametrize(
    "url", ["http://me:X@host", "http://me:X@host?a=1", "http://me:X#@host:80", "http://me:X@host:port"]
)
def test_no_password_in_an_address(url: str) -> None:
    with pytest.raises(
        ValueError, match="server_url has a password in it; put the server's key into the variable"
    ) as e:
        Server(url.replace("X", "secret"), 1.0)
    assert "secret" not in str(e.value)
