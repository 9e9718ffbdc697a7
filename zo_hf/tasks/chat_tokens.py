"""Rows as their tokens, before the model is loaded: the chat template they need, and how many are longer than allowed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from zo_hf.tasks.chat_rows import ChatRows
from zo_hf.tasks.loading import reason

#: For a tokenizer without a template. What the assistant says, and its end, are marked for the loss.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: "
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


_BREAK = r"'(?:\\n|\n)'"
#: A turn in templates of ChatML, which many models share.
_CHATML_TURN = re.compile(
    r"\{\{\s*'<\|im_start\|>'\s*\+\s*message\['role'\]\s*\+\s*"
    + _BREAK
    + r"\s*\+\s*message\['content'\]\s*\+\s*'<\|im_end\|>'\s*\+\s*"
    + _BREAK
    + r"\s*\}\}"
)
#: The same turn, with the marks.
_MARKED_TURN = (
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
)


@dataclass(frozen=True)
class Lengths:
    """Rows and their tokens.

    Attributes:
        rows: how many rows there are.
        cut: how many have more tokens than allowed.
        left_out: how many of those have no token of the loss among the allowed ones.
    """

    rows: int
    cut: int
    left_out: int


def use_template(
    tokenizer: PreTrainedTokenizerBase, path: str | None, rows: ChatRows, say: Callable[[str], None]
) -> None:
    """Give a tokenizer the template of a file; or, if it has none and the rows are chats, a simple one.

    Args:
        tokenizer: the model's tokenizer.
        path: the value of --chat_template_path.
        rows: the rows to train on.
        say: prints a line.

    Raises:
        ValueError: the file cannot be read, or the tokenizer has no token for the end of a text.
    """
    if path is not None:
        if not path.endswith((".jinja", ".j2")):
            raise ValueError(f"--chat_template_path {path} does not end in .jinja; name a file with a Jinja template.")
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ValueError(
                f"--chat_template_path {path} cannot be read ({reason(error)}); name a text file."
            ) from error
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no token for the end of a text; name one of its tokens with --eos_token.")
    if rows.is_chat and tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_TEMPLATE
        say(
            "template   the tokenizer has none: a simple one, `User: ...` and `Assistant: ...`, is used and saved with it"
        )


def mark_assistant(tokenizer: PreTrainedTokenizerBase, rows: ChatRows) -> str | None:
    """Return the template that marks the tokens of the assistant, as TRL chooses it; None means the tokenizer's own.

    A tokenizer's template of ChatML gets the marks. It gives the same text as before.

    Raises:
        ValueError: the rows are no chats, a row has no turn of the assistant, or the template cannot mark them.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if not rows.is_chat:
        raise ValueError(
            f"--assistant_only_loss needs messages, and {rows.name} has {rows.in_words}; leave it out, or write messages."
        )
    for number, row in enumerate(rows.rows, 1):
        if all(message["role"] != "assistant" for name in rows.columns for message in row[name]):
            raise ValueError(
                f"--assistant_only_loss finds no turn of the assistant in row {number} of {rows.name}; leave such rows out."
            )
    if isinstance(tokenizer.chat_template, str):
        marked, turns = _CHATML_TURN.subn(lambda _: _MARKED_TURN, tokenizer.chat_template)
        if turns == 1:
            tokenizer.chat_template = marked
    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ValueError(
            "--assistant_only_loss needs a chat template with {% generation %} around the turns of the assistant; name one with "
            "--chat_template_path, or write rows of `prompt` and `completion`, whose loss is on the completion."
        ) from error
    return template


def lengths(
    tokenizer: PreTrainedTokenizerBase, rows: ChatRows, most: int, loss: str, template: str | None = None
) -> Lengths:
    """Count the rows that are cut.

    Args:
        tokenizer: the model's tokenizer, with its template.
        rows: the rows.
        most: maximum number of tokens of a row.
        loss: the tokens of the loss: "all", "completion" or "assistant".
        template: a chat template to use instead of the tokenizer's.

    Raises:
        ValueError: the template does not take a row, or marks none of its tokens for the loss.
    """
    cut = left_out = 0
    for number, row in enumerate(rows.rows, 1):
        try:
            count, first = _tokens(tokenizer, rows, row, loss, template)
        except Exception as error:  # a template raises what it likes
            raise ValueError(
                f"the chat template does not take row {number} of {rows.name} ({reason(error)}); change the row, or name "
                "another template with --chat_template_path."
            ) from error
        if first is None:
            raise ValueError(
                f"the chat template marks no token of the assistant in row {number} of {rows.name}; put "
                "{% generation %} around its turns, or leave --assistant_only_loss out."
            )
        cut += count > most
        left_out += first >= most
    if left_out == len(rows.rows):
        raise ValueError(
            f"every row of {rows.name} has more than {most} tokens before the first one of the loss; give a larger "
            "--max_length, if the model has as many positions, or shorter rows."
        )
    return Lengths(len(rows.rows), cut, left_out)


def _tokens(
    tokenizer: PreTrainedTokenizerBase, rows: ChatRows, row: dict[str, Any], loss: str, template: str | None
) -> tuple[int, int | None]:
    """Return the number of tokens of a row, and the index of the first one of the loss; None if it has none."""
    if not rows.is_chat:
        count = len(tokenizer("".join(row[name] for name in rows.columns))["input_ids"])
        return count, len(tokenizer(row["prompt"])["input_ids"]) if loss == "completion" else 0

    def rendered(messages: list[dict[str, str]], **more: Any) -> Any:
        return tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True, **more)

    whole = rendered(
        [message for name in rows.columns for message in row[name]], return_assistant_tokens_mask=loss == "assistant"
    )
    count = len(whole["input_ids"])
    if loss == "assistant":
        mask = whole["assistant_masks"]
        return count, mask.index(1) if 1 in mask else None
    if loss == "completion":
        return count, len(rendered(row["prompt"], add_generation_prompt=True)["input_ids"])
    return count, 0
