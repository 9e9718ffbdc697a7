"""Classification of sentences with a causal language model by the log-probability of each label's word."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from zo_hf.tasks.batching import left_pad, takes_argument
from zo_hf.tasks.prompts import Prompt, encode_prompt, label_token_ids, pad_token_id

NEUTRAL_TEXTS = ("N/A", "[MASK]", "")


def label_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    prompt: Prompt,
    batch_size: int = 16,
    max_length: int = 512,
) -> Tensor:
    """Return the log-probability of each label's token after the prompt, over the whole vocabulary.

    Batches hold sentences of similar length. If the model supports it, only the logits of the last position are
    computed. The model is evaluated without dropout, and its mode is restored.

    Returns:
        float32 on CPU, of shape (sentences, labels), in the order of `sentences`.

    Raises:
        ValueError: the prompt does not fit the tokenizer or `max_length`.
    """
    encoded = [encode_prompt(tokenizer, prompt, text, max_length) for text in sentences]
    return next_token_scores(model, tokenizer, encoded, label_token_ids(tokenizer, prompt), batch_size)


@torch.no_grad()
def next_token_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    candidates: Sequence[int],
    batch_size: int = 16,
) -> Tensor:
    """Return the log-probability of each candidate after encoded questions; see `label_scores`.

    Args:
        model: a causal language model.
        tokenizer: pads the questions.
        encoded: the token ids of the questions.
        candidates: token ids.
        batch_size: questions in a forward pass.

    Returns:
        float32 on CPU, of shape (questions, candidates).
    """
    by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    device = next(model.parameters()).device
    options: dict[str, Any] = {"logits_to_keep": 1} if takes_argument(model, "logits_to_keep") else {}
    if takes_argument(model, "use_cache"):
        options["use_cache"] = False
    takes_positions = takes_argument(model, "position_ids")
    scores = torch.empty(len(encoded), len(candidates))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start : start + batch_size]
            batch = left_pad([encoded[row] for row in rows], pad_token_id(tokenizer))
            if not takes_positions:
                del batch["position_ids"]
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            logits = model(**inputs, **options).logits[:, -1]
            scores[rows] = logits.float().log_softmax(dim=-1)[:, candidates].cpu()
    finally:
        model.train(was_training)
    return scores


def label_prior(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Tensor:
    """Return the mean log-probability of each label on texts without content (Zhao et al. 2021).

    Returns:
        float32 on CPU, of shape (labels,).
    """
    scores = label_scores(model, tokenizer, NEUTRAL_TEXTS, prompt)
    return scores.softmax(dim=-1).mean(dim=0).log()


def calibrated(scores: Tensor, prior: Tensor) -> Tensor:
    """Subtract the labels' scores on texts without content, (labels,), from scores, (sentences, labels)."""
    return scores - prior


def accuracy(scores: Tensor, labels: Sequence[int]) -> float:
    """Return the fraction of sentences with the highest of their scores, (sentences, labels), at their label."""
    return (scores.argmax(dim=-1) == torch.tensor(list(labels))).sum().item() / len(labels)


def majority_accuracy(labels: Sequence[int]) -> float:
    """Return the accuracy of always answering the most frequent label."""
    return max(labels.count(label) for label in set(labels)) / len(labels)


def constant_loss(labels: Sequence[int]) -> float:
    """Return the cross entropy, in nats, of answering every sentence with the frequencies of the labels."""
    shares = [labels.count(label) / len(labels) for label in set(labels)]
    return -sum(share * math.log(share) for share in shares)
