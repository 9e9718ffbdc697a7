"""Detached values are the same at every probe of a batch, as a gradient treats them as constants.

A loss such as GRPO's has the ratio of a probability to its own detached value. A difference of losses would see no slope,
because both values move with the probe. So the values that it detaches at the current point ξ stand in for those of probes:

    c = (L(ξ + ε·z; d) - L(ξ - ε·z; d)) / 2ε        d: the values that the loss detaches at ξ

The gradient of L is that of its first argument, so c estimates the gradient that a backward pass would give. The evaluation
at ξ costs one more forward pass a micro-batch. It is left out once a test has found that detached values do not matter.
This holds for values that a loss passes through `detach` or `.data`, or makes a Python number of with `item()` or `float()`,
outside of the model's forward. Values that it computes under `torch.no_grad()` move with the probe; see
`zo_hf.trainer.objectives`. A loss that is itself such a value has no gradient at all, and then the value is what counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode, _push_mode

_DETACH = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
_NUMBER = (Tensor.item, Tensor.__float__)
#: Probes after which a loss that has moved with its detached values alone is believed to have no others.
PROBES_ALONE = 8


class StopGradients(TorchFunctionMode):
    """Keeps the values that a loss detaches at its first evaluation, and returns them at every later one."""

    def __init__(self) -> None:
        super().__init__()
        self._values: list[Tensor | float] = []
        self._position = 0
        self._is_first = True

    def __enter__(self) -> StopGradients:
        self._position = 0
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._is_first = False

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        is_value = func in _DETACH and isinstance(result, Tensor) and result.is_floating_point()
        if not is_value and not (func in _NUMBER and isinstance(result, float)):
            return result
        # The engine's own code detaches the tensors that make a probe.
        if str(sys._getframe(1).f_globals.get("__name__", "")).startswith("zo_hf."):
            return result
        if self._is_first:
            self._values.append(result)
            return result
        position, self._position = self._position, self._position + 1
        kept = self._values[position] if position < len(self._values) else result
        return kept if _is_alike(kept, result) else result

    @property
    def is_empty(self) -> bool:
        """True if the first evaluation has detached nothing."""
        return not self._values

    @staticmethod
    def suspend() -> StopGradients | None:
        """Take the mode off for a forward of the model, which then runs at full speed; return it for `resume`."""
        mode = _get_current_function_mode()
        if not isinstance(mode, StopGradients):
            return None
        _pop_mode()
        return mode

    @staticmethod
    def resume(mode: StopGradients | None) -> None:
        """Put back what `suspend` returned."""
        if mode is not None:
            _push_mode(mode)


def _is_alike(kept: Tensor | float, result: Tensor | float) -> bool:
    if isinstance(kept, Tensor) and isinstance(result, Tensor):
        return kept.shape == result.shape and kept.dtype == result.dtype
    return isinstance(kept, float) and isinstance(result, float)


class DetachTest:
    """Finds out whether the values that a loss detaches matter to it: metrics detach, too.

    Args:
        all_reduce_and: turns this process's answer into the AND over all processes.

    Attributes:
        matters: the answer; None until a loss has given it.
    """

    def __init__(self, all_reduce_and: Callable[[Tensor], bool]) -> None:
        self._all_reduce_and = all_reduce_and
        self._alone = 0
        self.matters: bool | None = None

    def see_first(self, values: StopGradients, loss: Any, device: torch.device) -> None:
        """Note the loss of the first evaluation of a batch, and what it has detached."""
        has_none = values.is_empty or not isinstance(loss, Tensor)  # a number of Python has no gradient
        if self.matters is None and self._all_reduce_and(torch.tensor(has_none, device=device)):
            self.matters = False

    def see(self, first: float, kept: float, moved: float, device: torch.device) -> None:
        """Draw the conclusion from a probe's loss, if there is one.

        Args:
            first: the loss of the first evaluation; a probe with the same loss, as at the current point, tells nothing.
            kept: the loss at the probe, with the values of the first evaluation. If it is `first`, the loss may have no
                other values. Rounding can hide them, so only several such probes tell.
            moved: the loss at the probe, with its own values.
            device: device of the model.
        """
        if not self._all_reduce_and(torch.tensor(kept in (moved, first), device=device)):
            self.matters = True
        elif self._all_reduce_and(torch.tensor(kept != first, device=device)):
            self.matters = False
        elif self._all_reduce_and(torch.tensor(kept == first != moved, device=device)):
            self._alone += 1
            if self._alone == PROBES_ALONE:
                self.matters = False
