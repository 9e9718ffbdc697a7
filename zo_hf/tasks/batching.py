"""Left-padded batches for causal language models, and the arguments of a model's forward."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def left_pad(sequences: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Batch token ids so that every sequence ends in the last column.

    Positions count from 0 at the first real token. So a model with learned positions gives the same result as for the
    unpadded sequence, even if it does not derive positions from the mask.

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
    """Return whether the forward of the model, or of the model inside a PEFT wrapper, has this argument."""
    wrapped = getattr(model, "get_base_model", lambda: model)()
    return name in inspect.signature(wrapped.forward).parameters
