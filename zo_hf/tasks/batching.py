"""Left-padded batches for causal language models, and what a model's forward takes."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def left_pad(sequences: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Batch token ids so that every sequence ends in the last column.

    Positions count from 0 at the first real token: a model with learned positions then computes what it computes for
    the unpadded sequence, whether or not it derives positions from the mask by itself.

    Returns:
        `input_ids`, `attention_mask` and `position_ids`, each of shape (sequences, longest) and int64.
    """
    longest = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), longest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, longest - len(sequence) :] = torch.tensor(sequence)
        attention_mask[row, longest - len(sequence) :] = 1
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


def takes_argument(model: nn.Module, name: str) -> bool:
    """Whether the model's forward names this argument (behind a PEFT wrapper, the wrapped model's forward)."""
    wrapped = getattr(model, "get_base_model", lambda: model)()
    return name in inspect.signature(wrapped.forward).parameters
