"""Log-probabilities of labels from the model's own head, as TRL's losses read them.

TRL's head multiplies by the weight of the model's head outside of that module. There every row would have the same weight,
so these come from the model's logits, at the labels alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zo_hf.evaluation.known_losses import IGNORED
from zo_hf.evaluation.model_loss import only_labeled_logits

#: Tokens whose probabilities are computed at once. A tile of a large vocabulary takes 0.6 GB.
TILE = 1024


@dataclass(frozen=True)
class TokenOutputs:
    """Outputs for every token, as TRL's losses read them; all are 0 or False where no label is.

    Attributes:
        log_probs: log-probabilities of the labels, (rows, length - 1), float32.
        entropy: entropies of the distributions, of the same shape.
        mean_logits: means of the logits, of the same shape.
        is_top1: whether the label is the most likely token, of the same shape.
        label_mask: whether there is a label, of the same shape.
    """

    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    label_mask: Tensor


def token_outputs(model: nn.Module, unwrapped: PreTrainedModel, inputs: dict[str, Any]) -> TokenOutputs:
    """Return the outputs of one forward pass.

    Args:
        model: the module to call.
        unwrapped: the transformers model inside.
        inputs: a batch with `labels`, (rows, length).
    """
    labels = inputs["labels"][:, 1:]
    kept = only_labeled_logits(unwrapped, inputs)
    positions = kept.get("logits_to_keep")
    kept = {name: value for name, value in kept.items() if name not in ("labels", "shift_labels")}
    logits = model(**kept)["logits"]
    mask = labels != IGNORED
    at_labels = mask if positions is None else mask[:, positions]
    logits = logits[:, :-1] if positions is None else logits
    tiles = zip(logits[at_labels].split(TILE), labels[mask].split(TILE), strict=True)
    found = [_of_tokens(*tile) for tile in tiles]
    whole = [_at(mask, torch.cat(values)) for values in zip(*found, strict=True)] if found else []
    log_probs, entropy, mean_logits, is_top1 = whole or [mask.new_zeros(mask.shape).float()] * 4
    return TokenOutputs(log_probs, entropy, mean_logits, is_top1.bool(), mask)


def _of_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the values of `TokenOutputs`, (tokens,) each, from logits (tokens, vocabulary) and labels (tokens,)."""
    logits = logits.float()
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(1, labels[:, None])[:, 0], entropy, logits.mean(-1), logits.argmax(-1) == labels


def _at(mask: Tensor, values: Tensor) -> Tensor:
    """Return values, (tokens,), at the places where the mask is True, in the shape of the mask, and 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
