"""Batches of prompts: token ids with padding on the left, and the columns that reward functions get."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

#: Columns that no reward function gets as such; TRL's.
_NOT_PASSED = ("prompt", "completion", "completion_ids")


def is_conversation(prompt: Any) -> bool:
    """Return whether a prompt is a list of messages, with a role each."""
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, Mapping) and "role" in m for m in prompt)


@dataclass(frozen=True)
class PromptCollator:
    """Makes a batch of a data set's rows.

    A batch has `input_ids` and `attention_mask`, int64 of shape (prompts, longest). Its `prompts` are a list of them as
    they are in the data set, and its `columns` the other columns as lists.

    Args:
        tokenizer: the model's tokenizer.
        pad_token_id: the token on the left of shorter prompts, which is masked.
        max_prompt_length: number of tokens that are kept of a longer prompt, its last ones; None keeps all.
        chat_template_kwargs: arguments of the tokenizer's chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int
    max_prompt_length: int | None
    chat_template_kwargs: Mapping[str, Any]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Batch the rows.

        Raises:
            ValueError: a row has no prompt, or one without tokens; the message says which it needs.
        """
        for example in examples:
            if "prompt" not in example:
                raise ValueError(
                    f"a row of the data set has the columns {', '.join(example) or 'none'}; EvolutionTrainer needs a "
                    "column 'prompt', with texts or lists of messages."
                )
        prompts = [example["prompt"] for example in examples]
        encoded = [self._encode(prompt) for prompt in prompts]
        longest = max(map(len, encoded))
        padded = [[self.pad_token_id] * (longest - len(ids)) + ids for ids in encoded]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded]
        names = [name for name in examples[0] if name not in _NOT_PASSED]
        return {
            "input_ids": torch.tensor(padded),
            "attention_mask": torch.tensor(mask),
            "prompts": prompts,
            "columns": {name: [example[name] for example in examples] for name in names},
        }

    def _encode(self, prompt: Any) -> list[int]:
        if is_conversation(prompt):
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            ids = self.tokenizer.apply_chat_template(prompt, **options | dict(self.chat_template_kwargs))["input_ids"]
        elif isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            raise ValueError(f"a prompt is a {type(prompt).__name__}; give a text or a list of messages.")
        if self.max_prompt_length is not None:
            ids = ids[-self.max_prompt_length :]
        if not ids:
            raise ValueError(f"the prompt {prompt!r} has no tokens; leave out such rows of the data set.")
        return list(ids)


def completion_of(prompt: Any, text: str) -> Any:
    """Return a generated text as reward functions get it: as a message if the prompt consists of messages."""
    return [{"role": "assistant", "content": text}] if is_conversation(prompt) else text


def up_to_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    """Return the tokens of an answer up to the first one that ends it, that one included."""
    return tokens[: next((place for place, token in enumerate(tokens, 1) if token in ends), None)]
