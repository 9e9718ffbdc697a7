"""Shared code of recipes that compare many short runs: encoded sentences, and an end for runs that diverge."""

import math
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from zo_hf.tasks.data import embedded_reviews
from zo_hf.tasks.prompts import PROMPT_A, encode_example, label_token_ids


def encoded_reviews(
    tokenizer: PreTrainedTokenizerBase, num_train: int, num_held_out: int, seed: int, words: range
) -> tuple[Dataset, Dataset]:
    """Return embedded sentences as training and held-out examples, whose only label is the label word.

    Args:
        tokenizer: encodes the sentences.
        num_train: maximum number of training sentences.
        num_held_out: maximum number of held-out sentences.
        seed: determines the selection.
        words: the allowed numbers of words in a sentence.
    """
    sentences = embedded_reviews(num_train, num_held_out, seed, words)
    label_ids = label_token_ids(tokenizer, PROMPT_A)

    def encode(rows: Dataset) -> Dataset:
        return Dataset.from_list(
            [encode_example(tokenizer, PROMPT_A, row["text"], label_ids[row["label"]], 4 * words.stop) for row in rows]
        )

    return encode(sentences.train), encode(sentences.held_out)


class StopWhenDiverged(TrainerCallback):
    """Ends a run when its logged loss exceeds a limit or is NaN.

    Attributes:
        limit: the limit; to be set before training.
    """

    limit = math.inf

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Check the logged loss."""
        control.should_training_stop |= not logs.get("loss", 0.0) < self.limit
