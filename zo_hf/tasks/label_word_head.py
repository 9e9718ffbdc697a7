"""Logits of the label words alone, for a loss that reads no others.

The output layer of a small model has as many weights as several of its layers: 28 of 135 million in SmolLM2-135M. Where
only the last layers run, because features in front of them are kept, most of a step's time would go into logits that
the loss among the label words never reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zo_hf.subspaces.peft_methods import base_model


@contextmanager
def label_words_alone(model: nn.Module, label_ids: Sequence[int], moving: Collection[nn.Module]) -> Iterator[None]:
    """Let the model's output layer compute the logits of the label words alone inside this context.

    The logits then have the shape (..., labels) in place of (..., vocabulary). An output layer that moves, or that is no
    plain linear layer in memory, stays as it is.

    Args:
        model: a causal language model.
        label_ids: the token of label 0, 1, ...
        moving: the modules that read what moves.
    """
    inner = base_model(model)
    head = inner.get_output_embeddings() if isinstance(inner, PreTrainedModel) else None
    is_plain = type(head) is nn.Linear and not head.weight.is_meta and "forward" not in head.__dict__
    if not isinstance(head, nn.Linear) or not is_plain or head in moving:
        yield
        return
    rows = torch.tensor(label_ids, device=head.weight.device)
    weight = head.weight.detach()[rows]
    bias = None if head.bias is None else head.bias.detach()[rows]

    def forward(x: Tensor) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward
