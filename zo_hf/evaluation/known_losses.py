"""The losses of transformers that are a known function of logits and labels, whole and in shares of groups of rows.

    language model             cross entropy of the logits at position t with the label at t + 1
    masked language model      cross entropy at the label's own position
    encoder-decoder            the same, because the decoder's inputs are the labels, shifted by one
    sequences and tokens       the loss of transformers' classes of these names

Most encoder-decoders return the mean over the labels of their own batch, whatever `num_items_in_batch` Trainer passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import (
    LOSS_MAPPING,
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from zo_hf.subspaces.functional import HALF, to_float

IGNORED = -100

# transformers derives the loss from the class name, and falls back to the causal loss for these names.
_CAUSAL_BY_DEFAULT = ("GPT2LMHeadModel", "BertLMHeadModel")

_GENERATES_TEXT = {
    *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
    *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values(),
    "VisionEncoderDecoderModel",
}


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of an encoder-decoder, (), in the dtype of the logits, as its forward does.

    Args:
        logits: (rows, length, vocabulary).
        labels: (rows, length).
    """
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


#: Losses that transformers computes in the dtype of the logits; it makes float32 of the logits of the others.
IN_DTYPE_OF_LOGITS: tuple[Callable, ...] = (ForSequenceClassificationLoss, mean_cross_entropy)

#: Losses that are a mean over the labels of a batch, and ignore `num_items_in_batch`.
MEANS: tuple[Callable, ...] = (ForSequenceClassificationLoss, ForTokenClassification, mean_cross_entropy)


def loss_kind(model: PreTrainedModel) -> Callable | None:
    """Return the function behind the model's own loss, or None if this module does not know it."""
    names = {base.__name__ for base in type(model).__mro__}
    name = model.loss_type
    if model.config.is_encoder_decoder and (name == "ForConditionalGeneration" or names & _GENERATES_TEXT):
        return ForMaskedLMLoss if name == "ForMaskedLM" else mean_cross_entropy
    if name is None and not names.isdisjoint(_CAUSAL_BY_DEFAULT):
        name = "ForCausalLM"
    kind = LOSS_MAPPING.get(name) if name is not None else None
    known = (ForCausalLMLoss, ForMaskedLMLoss, ForSequenceClassificationLoss, ForTokenClassification)
    return kind if kind in known else None


def known_loss(
    model: PreTrainedModel, logits: Tensor, inputs: Mapping[str, Any], count: Tensor | int | None = None
) -> Tensor:
    """Return the loss that the model computes from its logits, ().

    Args:
        model: a model with a `loss_kind`.
        logits: (rows, ..., classes).
        inputs: the batch, with `labels` and, for some of the positions only, `shift_labels`.
        count: divisor in place of the number of labels, see `num_items_in_batch` of Trainer.
    """
    labels, kind = inputs["labels"].to(logits.device), loss_kind(model)
    assert kind is not None, "the caller asks loss_kind first"
    if kind is mean_cross_entropy:
        return mean_cross_entropy(logits, labels)
    if kind is ForSequenceClassificationLoss:
        return ForSequenceClassificationLoss(labels, logits, model.config)
    if kind is ForTokenClassification:
        return ForTokenClassification(logits, labels, model.config)
    return kind(
        logits,
        labels,
        vocab_size=logits.shape[-1],
        num_items_in_batch=count,
        shift_labels=inputs.get("shift_labels"),
    )


def losses_of_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of every token, float32 (rows, positions); 0 where there is no target.

    Args:
        logits: (rows, positions, vocabulary).
        targets: int64 (rows, positions).
    """
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(targets.shape)


def targets_of(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Return the token that each position with logits predicts, int64 (rows, positions).

    Args:
        model: a model whose loss is that of tokens.
        inputs: the batch, with `labels` and, for some of the positions only, `shift_labels`.
    """
    targets: Tensor | None = inputs.get("shift_labels")
    if targets is not None:
        return targets
    labels: Tensor = inputs["labels"]
    kind: Any = loss_kind(model)
    is_shifted = kind is ForCausalLMLoss
    return nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:] if is_shifted else labels


def divisor_of(model: PreTrainedModel, targets: Tensor, count: Tensor | int | None) -> Tensor | int:
    """Return what the sum over the tokens of a batch is divided by in the model's loss; `count` as for `known_loss`."""
    kind: Any = loss_kind(model)
    return (targets != IGNORED).sum() if count is None or kind in MEANS else count


def shares_of_groups(
    model: PreTrainedModel,
    logits: Tensor,
    inputs: Mapping[str, Any],
    count: Tensor | int | None,
    groups: int,
    group_of: Tensor | None = None,
) -> Tensor:
    """Return the shares of groups in `known_loss`, (groups,): equal groups of consecutive rows, or of positions.

    The other arguments are those of `known_loss`. Losses of half-precision logits are computed in float32.

    Args:
        groups: the number of groups.
        group_of: the group of every position, int64 (rows, length) in ascending order; None if groups are of rows.
    """
    kind: Any = loss_kind(model)
    config = model.config
    if kind is ForSequenceClassificationLoss:
        labels = inputs["labels"].to(logits.device)
        if logits.dtype in HALF:
            labels, logits = to_float(labels), logits.float()
        if config.problem_type is None:
            ForSequenceClassificationLoss(labels, logits, config)  # decides on the type of the whole batch
        parts = zip(labels.chunk(groups), logits.chunk(groups), strict=True)
        return torch.stack([ForSequenceClassificationLoss(part, of, config) for part, of in parts]) / groups
    targets = targets_of(model, inputs).to(logits.device)
    return sums_of_groups(losses_of_tokens(logits, targets), groups, group_of) / divisor_of(model, targets, count)


def losses_of_rows(model: PreTrainedModel, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return the loss of every row by itself, (rows,): of a loss of tokens, the mean over the row's own.

    The arguments are those of `known_loss`. A row without labels has a loss of 0.
    """
    rows = len(logits)
    if loss_kind(model) is ForSequenceClassificationLoss:
        return shares_of_groups(model, logits, inputs, None, rows) * rows
    targets = targets_of(model, inputs).to(logits.device)
    return means_of_rows(losses_of_tokens(logits, targets), targets)


def means_of_rows(losses: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over the tokens of every row that have a target, (rows,).

    Args:
        losses: the losses of tokens, (rows, positions).
        targets: their targets, int64 (rows, positions).
    """
    return losses.sum(1) / (targets != IGNORED).sum(1).clamp(min=1)


def sums_of_groups(losses: Tensor, groups: int, group_of: Tensor | None = None) -> Tensor:
    """Return the sum over the tokens of every group, (groups,).

    Args:
        losses: the losses of tokens, (rows, positions).
        groups: the number of groups.
        group_of: see `shares_of_groups`.
    """
    if group_of is None:
        return losses.view(groups, -1).sum(1)
    sizes = group_of.flatten().bincount(minlength=groups).tolist()
    return torch.stack([part.sum() for part in losses.flatten().split(sizes)])
