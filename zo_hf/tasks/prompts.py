"""Classification as next-word prediction: a template around the text, and one word per label.

As in MeZO (Malladi et al. 2023), training minimizes the cross entropy of the label's word at the one position that
predicts it. `--loss` selects the label words or the whole vocabulary.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from zo_hf.tasks.batching import left_pad, takes_argument

logger = logging.getLogger(__name__)

IGNORED = -100


@dataclass(frozen=True)
class Prompt:
    """A template that turns a text into a question, and the words that answer it.

    Attributes:
        template: a string with `{text}` exactly once, e.g. `"{text} It was"`.
        verbalizers: the word for label 0, 1, ..., each with its leading space, e.g. `(" terrible", " great")`.

    Raises:
        ValueError: the template lacks `{text}`, or there are fewer than two distinct verbalizers.
    """

    template: str
    verbalizers: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.template.count("{text}") != 1:
            raise ValueError(f"--template {self.template!r} must contain {{text}} exactly once.")
        if len(self.verbalizers) < 2 or len(set(self.verbalizers)) != len(self.verbalizers):
            raise ValueError(f"--verbalizers {list(self.verbalizers)} must be two or more different words.")

    def fill(self, text: str) -> str:
        """Return the question about `text`, without the label word that follows it."""
        return self.template.replace("{text}", text)


PROMPT_A = Prompt("{text} It was", (" terrible", " great"))
PROMPT_B = Prompt("Review: {text}\nSentiment:", (" negative", " positive"))


def label_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Return the token of each label, which is the first token of its verbalizer after the prompt.

    A verbalizer of several tokens is scored by its first token alone, with a warning in the log.

    Raises:
        ValueError: two labels share their first token, or the tokenizer merges the verbalizer into the prompt.
    """
    question = prompt.fill("N/A")
    before = tokenizer(question)["input_ids"]
    ids = []
    for word in prompt.verbalizers:
        after = tokenizer(question + word)["input_ids"]
        if after[: len(before)] != before or len(after) == len(before):
            raise ValueError(
                f"the tokenizer does not separate {word!r} of --verbalizers from the prompt; start each of --verbalizers with "
                "a space, and end --template without one."
            )
        if len(after) > len(before) + 1:
            first = tokenizer.decode(after[len(before) : len(before) + 1])
            logger.warning("the label word %r has several tokens; it is scored by the first one, %r", word, first)
        ids.append(after[len(before)])
    if len(set(ids)) != len(ids):
        raise ValueError(f"--verbalizers {list(prompt.verbalizers)} must differ in their first token; choose others.")
    return ids


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str, max_length: int, room: int = 0
) -> list[int]:
    """Return the token ids of the question about `text`, with the end of the text cut to fit in `max_length` tokens.

    Args:
        tokenizer: the model's tokenizer.
        prompt: the prompt around the text.
        text: the sentence.
        max_length: maximum number of tokens, with `room` for others after the question.
        room: number of tokens that follow.

    Raises:
        ValueError: the template alone is longer than `max_length`.
    """
    most = max_length - room
    ids = tokenizer(prompt.fill(text))["input_ids"]
    if len(ids) <= most:
        return ids
    # The template must stay whole, and tokenizers may merge across its border with the text. So characters are cut,
    # not tokens, and the number of characters is found by bisection of the interval [fits, too_long).
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if len(tokenizer(prompt.fill(text[:middle]))["input_ids"]) <= most:
            fits = middle
        else:
            too_long = middle
    ids = tokenizer(prompt.fill(text[:fits]))["input_ids"]
    if len(ids) > most:
        raise ValueError(f"--max_length {max_length} is shorter than --template {prompt.template!r}; raise it.")
    return ids


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str, label_id: int, max_length: int
) -> dict[str, list[int]]:
    """Return one training example: the question followed by the label's token `label_id`, which alone has a loss.

    Returns:
        `input_ids` and `labels`, both at most `max_length` long. The model itself shifts the labels.
    """
    question = encode_prompt(tokenizer, prompt, text, max_length, room=1)
    return {"input_ids": [*question, label_id], "labels": [IGNORED] * len(question) + [label_id]}


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding token, else the end token, else 0; padding is masked, so the choice has no effect."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0


class LabelWordCollator:
    """Left-pads examples of `encode_example` into a batch for a causal language model.

    If the model has the argument `logits_to_keep`, the batch requests logits at the last two positions only. These are
    the position that predicts the label token, and that of the label token. The loss is the same, and the logits,
    often the largest tensor of a forward pass, become much smaller.

    A batch has `input_ids`, `attention_mask` and, if the model takes them, `position_ids`, all of shape (batch,
    longest). Its `labels` have the shape (batch, longest), or (batch, 2) with `logits_to_keep=2`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
        self.pad_token_id = pad_token_id(tokenizer)
        self.takes_positions = takes_argument(model, "position_ids")
        self.takes_logits_to_keep = takes_argument(model, "logits_to_keep")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | int]:
        """Batch the examples; `input_ids` and `labels` of an example have the same length."""
        batch: dict[str, Tensor | int] = dict(left_pad([row["input_ids"] for row in examples], self.pad_token_id))
        if not self.takes_positions:
            del batch["position_ids"]
        labels = left_pad([row["labels"] for row in examples], IGNORED)["input_ids"]
        if self.takes_logits_to_keep:
            batch["logits_to_keep"] = 2
            labels = labels[:, -2:]
        batch["labels"] = labels.to(torch.int64)
        return batch
