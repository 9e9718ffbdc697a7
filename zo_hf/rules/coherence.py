"""Coherence of coordinate differences: how well those that CoCD remembers agree with those that it measures next.

    coherence = cos(old, new)        over the B coordinates of a step, before the new differences replace the old ones

A coordinate is measured once a cycle of n coordinates, so an old difference is K = n/B steps old. In between, the point has
moved, and the batch is another one; without either, the coherence is 1. On a quadratic the old entries of a step are those
of H·ξ where they were measured. No paper's: arXiv 2605.14373 reuses differences because gradients are coherent, and this is
the number that says how far they are.

The fading γᵏ is the same for all entries of equal age. A step's old entries may come from two neighboring steps, and the
later of them are then multiplied by γ once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Old differences that have faded below this part of what they were are no longer compared.
_FADED = 1e-20
#: Stands for NaN in a checkpoint, so that equal states compare as equal; no cosine has this value.
_NOT_COMPARED = 2.0


class Coherence:
    """Compares a step's differences with the old ones of the same coordinates.

    Args:
        dimension: n, number of coordinates; every one has an entry in memory.
        per_step: B, number of coordinates of a step.
        decay: γ.
        like: a tensor of the dtype and on the device of the differences.

    Attributes:
        of_steps: the coherence of the steps of the last cycle, step s at index s mod K; NaN where nothing was compared.
    """

    def __init__(self, dimension: int, per_step: int, decay: float, like: Tensor) -> None:
        self._dimension, self._per_step, self._decay = dimension, per_step, decay
        steps = -(-dimension // per_step)
        self.of_steps = like.new_full((steps,), torch.nan)
        self._has_faded = decay ** (steps - 1) < _FADED
        self._last = -1
        self._old = like.new_zeros(per_step)

    def before(self, step: int, old: Tensor) -> None:
        """Take the old differences of the coordinates of a step, (B,), before they fade once more.

        A step whose old differences are all zero has none: it is in the first cycle, or they were missed or forgotten.
        """
        missed = torch.arange(max(self._last + 1, step - len(self.of_steps)), step, device=old.device)
        self.of_steps[missed % len(self.of_steps)] = torch.nan
        self._last, self._old = step, old.clone()

    def after(self, step: int, new: Tensor) -> None:
        """Compare the step's new differences, (B,)."""
        turns = torch.arange(step * self._per_step, (step + 1) * self._per_step, device=new.device) - self._dimension
        at = turns.div(self._per_step, rounding_mode="floor")  # the steps that measured the old ones
        is_earlier = at == at[0]
        old = self._old.where(is_earlier, self._old * self._decay)
        # A part that a skipped step should have measured, or that a fold has cleared, has no old values.
        is_there = old != 0
        known = torch.where(is_earlier, (is_there & is_earlier).any(), (is_there & ~is_earlier).any()) & (turns >= 0)
        cosine = (_unit(old.where(known, 0.0)) * _unit(new.where(known, 0.0))).sum()
        self.of_steps[step % len(self.of_steps)] = torch.nan if self._has_faded else cosine

    def forget(self) -> None:
        """Drop the coherence of the last cycle, whose coordinates are no longer the same."""
        self.of_steps.fill_(torch.nan)

    def state(self) -> Tensor:
        """Return `of_steps` for a checkpoint, (K,), without NaN."""
        return self.of_steps.nan_to_num(_NOT_COMPARED)

    def load(self, of_steps: Tensor | None, next_step: int) -> None:
        """Restore what `state` returned of a run whose next step is given; None of a run that has kept none.

        Raises:
            ValueError: it is of another length.
        """
        self._last = next_step - 1
        if of_steps is None:
            self.forget()
            return
        if of_steps.shape != self.of_steps.shape:
            raise ValueError(
                f"there are {of_steps.numel()} steps' coherences, and a cycle has {len(self.of_steps)} steps"
            )
        self.of_steps.copy_(of_steps)
        self.of_steps[self.of_steps == _NOT_COMPARED] = torch.nan

    def logs(self) -> dict[str, float]:
        """Return the coherence of the last step, and the mean over the last cycle, for the training log."""
        measured = self.of_steps[~self.of_steps.isnan()]
        if self._last < 0 or not len(measured):
            return {}
        found = {"zo/mean_coherence": float(measured.mean())}
        last = float(self.of_steps[self._last % len(self.of_steps)])
        return found if last != last else {"zo/coherence": last} | found


def _unit(vector: Tensor) -> Tensor:
    """Return a vector of length 1; NaN for zeros. Squares of faded entries would be zero, so they are scaled first."""
    scaled = vector / vector.abs().max()
    return scaled / scaled.norm()
