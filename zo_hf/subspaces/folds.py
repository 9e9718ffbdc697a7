"""When the coordinates of a run are folded into its weights, and the weight decay that has gathered until then.

An optimizer decays the coordinates, which are small. The decay of the weights themselves waits for the next fold:

    W ← Π (1 - η_t · λ) · W + f(ξ)        over the steps t since the last fold
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from zo_hf.parallel.signals import whole
from zo_hf.subspaces.folded import Folded
from zo_hf.subspaces.subspace import Subspace


class Folds:
    """Folds a subspace when it is due; a subspace without separate coordinates is left alone.

    Args:
        subspace: the subspace.

    Attributes:
        decay: factor by which each weight shrinks at the next fold, by name; 1 if it is missing.
    """

    def __init__(self, subspace: Subspace) -> None:
        self._subspace = subspace
        self.decay: dict[str, float] = {}

    def advance(self, step: int, optimizer: Optimizer) -> bool:
        """Take note of a step of the optimizer, and fold if it is time.

        Args:
            step: number of steps that have been taken.
            optimizer: the optimizer, which has just taken the last one.

        Returns:
            True if the coordinates have been folded.
        """
        subspace = self._subspace
        if not isinstance(subspace, Folded):
            return False
        for name, factor in decay_of_step(subspace.coordinates, optimizer).items():
            self.decay[name] = self.decay.get(name, 1.0) * factor
        is_due = subspace.fold_steps > 0 and step % subspace.fold_steps == 0
        if is_due:
            subspace.fold(step, self.decay)
            self.decay = {}
        subspace.next_fold = step, self.decay
        return is_due

    def finish(self, step: int) -> nn.Module:
        """Fold what is left, and remove the subspace from the model; return the trained model, see `Subspace.finish`."""
        subspace, decay = self._subspace, self.decay
        self.decay = {}
        if step == 0 and isinstance(subspace, Folded) and subspace.at_origin:
            subspace.clear_gradient()  # nothing is written: adding zeros would turn a weight of -0.0 into 0.0
            subspace.detach()
            return subspace.model
        with whole():
            return subspace.finish(step, decay)

    def state_dict(self, step: int) -> dict[str, Tensor] | None:
        """Return a state dict of the model as `finish` would leave it; None if the model already is in that state."""
        return self._subspace.folded_state_dict(step, self.decay)

    def load(self, step: int, decay: Mapping[str, float]) -> None:
        """Continue a run after `step` steps, with the decay that had gathered."""
        self.decay = dict(decay)
        if isinstance(self._subspace, Folded):
            self._subspace.next_fold = step, self.decay


def decay_of_step(coordinates: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, float]:
    """Return the factors by which an optimizer's last step decayed coordinates, by name, where they are not 1.

    The next fold applies them to the weights as well.
    """
    names = {id(coordinate): name for name, coordinate in coordinates.items()}
    return {
        names[id(parameter)]: 1.0 - float(group["lr"]) * group["weight_decay"]
        for group in optimizer.param_groups
        if float(group["lr"]) * group.get("weight_decay", 0.0) != 0.0
        for parameter in group["params"]
        if parameter.grad
        is not None  # else a skipped step, in which the optimizer did not decay the coordinate either
    }
