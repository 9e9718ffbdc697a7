"""The weight of a micro-batch's loss in the loss of its step.

Trainer passes `num_items_in_batch`, the labels of the whole step, to every model whose forward takes keyword arguments.
It then adds up the losses of the micro-batches. That is right for a loss that divides by this count. A loss that is a
mean over its own micro-batch ignores the count, and the sum would be as many times too large as there are micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForMaskedLMLoss

from zo_hf.evaluation.evaluate import one_number
from zo_hf.evaluation.known_losses import IGNORED, MEANS, loss_kind
from zo_hf.rng.global_generators import GlobalGenerators


class CountTest:
    """Finds out whether a loss divides by `num_items_in_batch`: by evaluating it with the count and with twice the count.

    Args:
        all_reduce_and: turns this process's answer into the AND over all processes.

    Attributes:
        divides: the answer; None until a loss other than 0 has been seen.
    """

    def __init__(self, all_reduce_and: Callable[[Tensor], bool]) -> None:
        self._all_reduce_and = all_reduce_and
        self.divides: bool | None = None

    @torch.no_grad()
    def see(self, loss_with: Callable[[Any], Callable[[], Any]], count: Tensor | int, device: torch.device) -> None:
        """Evaluate a micro-batch's loss twice, and draw the conclusion if there is one.

        Args:
            loss_with: returns the closure of the loss, given the count.
            count: the step's number of labels.
            device: device of the model.
        """
        if self.divides is not None:
            return
        before = GlobalGenerators.now(device)
        once = one_number(loss_with(count)(), device).item()
        before.restore()
        twice = one_number(loss_with(2 * count)(), device).item()
        before.restore()
        known = math.isfinite(once) and math.isfinite(twice) and once != 0
        changes = known and abs(once - twice) > 1e-4 * abs(once)
        if not self._all_reduce_and(torch.tensor(not changes, device=device)):
            self.divides = True
        elif not self._all_reduce_and(torch.tensor(not known, device=device)):
            self.divides = False


def share_of_labels(model: Any, inputs: dict[str, Any], count: Tensor | int) -> Tensor | None:
    """Return the share of a step's labels that a micro-batch has, (); None if the model's loss is not known to be their mean.

    Args:
        model: the transformers model, without wrappers.
        inputs: the micro-batch.
        count: the step's number of labels.
    """
    if not isinstance(model, PreTrainedModel) or loss_kind(model) not in (*MEANS, ForMaskedLMLoss):
        return None
    return inputs["labels"].ne(IGNORED).sum() / count
