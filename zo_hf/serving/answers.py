"""Reading of a server's answers, which are untrusted: their sizes, types and values are checked.

A completion with `prompt_logprobs` has, for every token of the prompt, an object of log-probabilities by token:

    {"choices": [{"index": 0, "prompt_logprobs": [null, {"42": {"logprob": -1.5, ...}}, ...], "token_ids": [7, ...]}]}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zo_hf.serving.errors import BadAnswer
from zo_hf.untrusted.fields import brief, is_object, is_text, list_of, maybe, number, shown, whole

#: A logarithm of a probability may be above 0 by what half precision rounds. Servers write about -1e4 for a probability of 0.
_is_logarithm = number(-1e6, 0.01)


@dataclass(frozen=True)
class BaseModel:
    """The model that a server serves without an adapter.

    Args:
        name: its name in requests.
        longest: number of tokens that a prompt and its answer may have together; None if the server does not tell.
    """

    name: str
    longest: int | None


def base_model(answer: Any) -> BaseModel:
    """Return the first model of a list of models that is no adapter of another one.

    Raises:
        BadAnswer: there is none.
    """
    models = answer.get("data") if is_object(answer) else None
    for model in models if isinstance(models, list) else ():
        if is_object(model) and model.get("parent") is None and is_text(model.get("id")):
            longest = model.get("max_model_len")
            if not maybe(whole(1))(longest):
                raise BadAnswer(f"its model {shown(model['id'])} has max_model_len={brief(longest)}")
            return BaseModel(model["id"], longest)
    raise BadAnswer("it lists no model")


def adapters(answer: Any) -> set[str]:
    """Return the names in a list of models that belong to adapters."""
    models = answer.get("data") if is_object(answer) else None
    named = [model for model in models if is_object(model)] if isinstance(models, list) else []
    return {model["id"] for model in named if model.get("parent") is not None and is_text(model.get("id"))}


def log_probabilities(answer: Any, rows: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return the log-probability of every token of every row but its first, given the tokens before it.

    Args:
        answer: the answer to a request with `prompt_logprobs`.
        rows: the prompts, as tokens.

    Raises:
        BadAnswer: a row or a token is missing, or a number is not a log-probability.
    """
    return [_of_prompt(choice, row) for choice, row in zip(_choices(answer, len(rows)), rows, strict=True)]


def completions(answer: Any, count: int, longest: int, vocabulary: int) -> list[list[int]]:
    """Return the tokens of every completion.

    Args:
        answer: the answer to a request with `return_token_ids`.
        count: number of prompts.
        longest: the largest number of tokens that was asked for.
        vocabulary: number of tokens of the model.

    Raises:
        BadAnswer: a completion is missing, too long, or has an unknown token.
    """
    fits = list_of(whole(0, vocabulary - 1), most=longest)
    found = []
    for choice in _choices(answer, count):
        tokens = choice.get("token_ids")
        if tokens is None:
            raise BadAnswer("a completion has no token_ids, which vLLM returns from version 0.10.2 on")
        if not fits(tokens):
            raise BadAnswer(f"a completion has the token_ids {brief(tokens)}, of which {longest} were asked for")
        found.append(tokens)
    return found


def message_of(answer: Any) -> str:
    """Return the message of an error, shortened and on one line."""
    error: Any = answer.get("error") if is_object(answer) else None
    message: Any = error.get("message") if is_object(error) else None
    return shown(" ".join(message.split()).rstrip(".")) if is_text(message) else "no message"


def _choices(answer: Any, count: int) -> list[Any]:
    """Return the choices of a completion in the order of the prompts."""
    choices: Any = answer.get("choices") if is_object(answer) else None
    if not list_of(is_object)(choices):
        raise BadAnswer("it has no list of choices")
    by_index = {choice["index"]: choice for choice in choices if whole(0, count - 1)(choice.get("index"))}
    if len(choices) != count or len(by_index) != count:
        raise BadAnswer(f"it has {len(by_index)} of {count} choices")
    return [by_index[index] for index in range(count)]


def _of_prompt(choice: Any, row: Sequence[int]) -> list[float]:
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(row):
        raise BadAnswer(f"prompt_logprobs does not have the {len(row)} tokens of the prompt")
    found = []
    for token, entry in zip(row[1:], entries[1:], strict=True):
        of_token: Any = entry.get(str(token)) if is_object(entry) else None
        value: Any = of_token.get("logprob") if is_object(of_token) else None
        if not _is_logarithm(value):
            raise BadAnswer(f"prompt_logprobs has {brief(value)} as the logarithm of a token's probability")
        found.append(float(value))
    return found
