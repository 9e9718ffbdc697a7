"""Classification as next-word prediction: a template around the text, and one word per label.

As in MeZO (Malladi et al. 2023), training minimises the cross entropy of the label's word over the whole vocabulary,
at the one position that predicts it.
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
    """How a text becomes a question, and which word answers it.

    Attributes:
        template: text with `{text}` once, e.g. `"{text} It was"`.
        verbalizers: the word that stands for label 0, 1, ...; with its leading space, e.g. `(" terrible", " great")`.

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
        """The question about `text`, up to where the label word follows."""
        return self.template.replace("{text}", text)


PROMPT_A = Prompt("{text} It was", (" terrible", " great"))
PROMPT_B = Prompt("Review: {text}\nSentiment:", (" negative", " positive"))


def label_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The token that stands for each label: the verbalizer's first token after the prompt.

    A verbalizer of several tokens is scored by its first one alone, which is logged as a warning.

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
                f"The tokenizer does not read the prompt and {word!r} as separate tokens: "
                "start each of --verbalizers with a space and end --template without one."
            )
        if len(after) > len(before) + 1:
            first = tokenizer.decode(after[len(before) : len(before) + 1])
            logger.warning("The label word %r is several tokens; its first, %r, stands for it.", word, first)
        ids.append(after[len(before)])
    if len(set(ids)) != len(ids):
        raise ValueError(f"--verbalizers {list(prompt.verbalizers)} must differ in their first token: choose others.")
    return ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str, max_length: int) -> list[int]:
    """Token ids of the question about `text`, the end of the text cut so that there are at most `max_length`.

    Raises:
        ValueError: the template alone is longer than `max_length`.
    """
    ids = tokenizer(prompt.fill(text))["input_ids"]
    if len(ids) <= max_length:
        return ids
    # The template must stay whole, and tokenizers may merge across its border with the text: so cut characters and
    # tokenize again, halving the interval [fits, too_long) of lengths.
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if len(tokenizer(prompt.fill(text[:middle]))["input_ids"]) <= max_length:
            fits = middle
        else:
            too_long = middle
    ids = tokenizer(prompt.fill(text[:fits]))["input_ids"]
    if len(ids) > max_length:
        raise ValueError(f"--max_length {max_length} is shorter than --template {prompt.template!r}: raise it.")
    return ids


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str, label_id: int, max_length: int
) -> dict[str, list[int]]:
    """One training example: the question followed by the label's token `label_id`, the only one with a loss.

    Returns:
        `input_ids` and `labels`, both at most `max_length` long; the model shifts the labels itself.
    """
    question = encode_prompt(tokenizer, prompt, text, max_length - 1)
    return {"input_ids": [*question, label_id], "labels": [IGNORED] * len(question) + [label_id]}


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or the end token where there is none: padding is masked, so which one does not matter."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0


class LabelWordCollator:
    """Left-pads examples of `encode_example` into a batch for a causal language model.

    Where the model takes `logits_to_keep`, the batch asks for the last two positions only (the one that predicts the
    label token, and the label token's own) and carries the labels of those: the loss is the same, and the logits over
    the vocabulary, often the largest tensor of a forward pass, are made for two positions instead of all.

    The batch has `input_ids`, `attention_mask` and, where the model takes them, `position_ids` of shape
    (batch, longest); `labels` of shape (batch, longest), or (batch, 2) beside `logits_to_keep=2`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
        self.pad_token_id = pad_token_id(tokenizer)
        self.takes_positions = takes_argument(model, "position_ids")
        self.takes_logits_to_keep = takes_argument(model, "logits_to_keep")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | int]:
        """Batch the examples, each with `input_ids` and `labels` of one length."""
        batch: dict[str, Tensor | int] = dict(left_pad([row["input_ids"] for row in examples], self.pad_token_id))
        if not self.takes_positions:
            del batch["position_ids"]
        labels = left_pad([row["labels"] for row in examples], IGNORED)["input_ids"]
        if self.takes_logits_to_keep:
            batch["logits_to_keep"] = 2
            labels = labels[:, -2:]
        batch["labels"] = labels.to(torch.int64)
        return batch
