"""Templates and lengths of rows, before a model is loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from zo_hf.tasks.chat_rows import ChatRows
from zo_hf.tasks.chat_tokens import DEFAULT_TEMPLATE, Lengths, lengths, mark_assistant, use_template

pytest.importorskip("trl")

USER, ASSISTANT = {"role": "user", "content": "a film"}, {"role": "assistant", "content": "great"}
CHAT = ChatRows("a", ("messages",), True, [{"messages": [USER, ASSISTANT]}])
PAIRS = ChatRows("a", ("prompt", "completion"), False, [{"prompt": "a film", "completion": " great"}])
TEXT = ChatRows("a", ("text",), False, [{"text": "a film"}, {"text": "a deep and moving film . It was great"}])
UNMARKED = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def own(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A tokenizer that a test may change."""
    return copy.deepcopy(tokenizer)


def test_a_tokenizer_without_template_gets_one_that_marks_the_assistant(own: Any) -> None:
    said: list[str] = []
    use_template(own, None, TEXT, said.append)
    assert own.chat_template is None and not said, "text needs none"
    use_template(own, None, CHAT, said.append)
    assert own.chat_template == DEFAULT_TEMPLATE and len(said) == 1
    made = own.apply_chat_template(CHAT.rows[0]["messages"], return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(made["input_ids"], made["assistant_masks"], strict=True) if mark]
    assert own.decode(made["input_ids"]).removeprefix("<s>") == "User: a film\nAssistant: great</s>\n"
    assert own.decode(marked).strip() == "great</s>" and mark_assistant(own, CHAT) is None


@pytest.mark.parametrize("template", [CHATML, CHATML.replace("\n", "\\n")])
def test_chatml_gets_marks_and_keeps_its_text(own: Any, template: str) -> None:
    messages = [*CHAT.rows[0]["messages"], USER, ASSISTANT]
    own.chat_template = template
    before = own.apply_chat_template(messages, tokenize=False)
    assert mark_assistant(own, CHAT) is None
    assert own.apply_chat_template(messages, tokenize=False) == before
    made = own.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(made["input_ids"], made["assistant_masks"], strict=True) if mark]
    assert own.decode(marked) == "great<|im_end|>" * 2


def test_a_template_of_a_file_replaces_the_tokenizers(own: Any, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(UNMARKED)
    own.chat_template = DEFAULT_TEMPLATE
    use_template(own, str(tmp_path / "chat.jinja"), CHAT, print)
    assert own.chat_template == UNMARKED


@pytest.mark.parametrize(
    ("rows", "template", "message"),
    [
        (PAIRS, DEFAULT_TEMPLATE, "needs messages, and a has prompt and completion"),
        (CHAT, UNMARKED, r"needs a chat template with \{% generation %\}"),
        (ChatRows("a", ("messages",), True, [*CHAT.rows, {"messages": [USER]}]), DEFAULT_TEMPLATE, "in row 2 of a"),
    ],
)
def test_an_assistant_only_loss_that_finds_no_assistant_is_refused(
    own: Any, rows: ChatRows, template: str, message: str
) -> None:
    own.chat_template = template
    with pytest.raises(ValueError, match=message):
        mark_assistant(own, rows)


@pytest.mark.parametrize(("name", "content"), [("a.txt", b""), ("none.jinja", None), ("a.jinja", b"\xff")])
def test_a_template_that_cannot_be_read_is_refused(own: Any, tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"^--chat_template_path .*\.$"):
        use_template(own, str(tmp_path / name), CHAT, print)


def test_a_tokenizer_without_an_end_is_refused(own: Any) -> None:
    own.eos_token = None
    with pytest.raises(ValueError, match="--eos_token"):
        use_template(own, None, TEXT, print)


def test_cut_rows_are_counted(own: Any) -> None:
    short, long = (len(own(row["text"])["input_ids"]) for row in TEXT.rows)
    assert lengths(own, TEXT, long, "all") == Lengths(2, 0, 0)
    assert lengths(own, TEXT, long - 1, "all") == Lengths(2, 1, 0)
    assert lengths(own, TEXT, short - 1, "all") == Lengths(2, 2, 0)


@pytest.mark.parametrize(("rows", "loss"), [(PAIRS, "completion"), (CHAT, "assistant")])
def test_rows_whose_answer_is_cut_off_are_left_out_and_not_all_of_them(own: Any, rows: ChatRows, loss: str) -> None:
    own.chat_template = DEFAULT_TEMPLATE
    row = dict(rows.rows[0])
    short = {name: [ASSISTANT] if rows.is_chat else "a" for name in row}
    first = next(most for most in range(1, 99) if not _left_out(own, rows, most, loss))
    both = ChatRows("a", rows.columns, rows.is_chat, [row, short])
    assert lengths(own, both, first - 1, loss).left_out == 1
    with pytest.raises(ValueError, match=r"every row of a has more than .* give a larger --max_length"):
        lengths(own, rows, first - 1, loss)


def _left_out(own: Any, rows: ChatRows, most: int, loss: str) -> bool:
    try:
        return bool(lengths(own, rows, most, loss).left_out)
    except ValueError:
        return True


@pytest.mark.parametrize(
    ("template", "loss", "message"),
    [
        ("{{ raise_exception('no system') }}", "all", "does not take row 1 of a .*no system"),
        ("{% for", "all", "does not take row 1"),
        (
            "{% if false %}{% generation %}{% endgeneration %}{% endif %}a",
            "assistant",
            "marks no token of the assistant",
        ),
    ],
)
def test_a_template_that_does_not_take_the_rows_is_one_sentence(
    own: Any, template: str, loss: str, message: str
) -> None:
    own.chat_template = template
    with pytest.raises(ValueError, match=message) as error:
        lengths(own, CHAT, 64, loss)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
