"""A check of what packing relies on: rows that share a sequence do not see each other."""

from __future__ import annotations

from typing import Any

import torch

from zo_hf.tasks.batching import takes_argument

#: The part of the logits' spread by which another row may change them; 8-bit layers round by what else is in a batch.
ROUNDING = 0.01


@torch.no_grad()
def keeps_rows_apart(model: Any) -> bool:
    """Return whether a row's logits stay as they are if the row before it in the same sequence is another one.

    Some models take `position_ids`, which begin anew with each row, and still attend to all tokens before.

    Args:
        model: a causal language model.
    """
    if not takes_argument(model, "position_ids"):
        return False
    words = model.config.get_text_config().vocab_size
    device = model.get_input_embeddings().weight.device
    row = torch.arange(4, device=device)
    after = [
        model(
            input_ids=torch.cat([(row + first) % words, (row + 1) % words])[None],
            position_ids=torch.cat([row, row])[None],
            use_cache=False,
        ).logits[0, len(row) :]
        for first in (2, words // 2)
    ]
    change = (after[0].float() - after[1].float()).abs().max()
    return bool(change <= ROUNDING * after[0].float().std())
