"""Detached values are the same at every probe of a batch, as a gradient treats them as constants.

A loss such as GRPO's has the ratio of a probability to its own detached value. A difference of losses would see no slope,
because both values move with the probe. So the values that it detaches at the current point ξ stand in for those of probes:

    c = (L(ξ + ε·z; d) - L(ξ - ε·z; d)) / 2ε        d: the values that the loss detaches at ξ

The gradient of L is that of its first argument, so c estimates the gradient that a backward pass would give. The evaluation
at ξ costs one more forward pass a micro-batch. It is left out once a test has found that detached values do not matter.
This holds for values that a loss passes through `detach` or `.data`, or makes Python numbers of with `item()`, `tolist()` or
`float()`, outside of the model's forward. It also holds for values that it computes under `torch.no_grad()` and uses
afterwards. A loss that is itself such a value has no gradient at all, and then the value is what counts.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode, _push_mode
from torch.utils._pytree import tree_map

from zo_hf.trainer.without_gradient import WithoutGradient, is_engines

_DETACH = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
_NUMBER = (Tensor.item, Tensor.tolist, Tensor.__float__)
#: Elements of the largest tensor that is copied, so that a loss may write into what it has detached.
MOST_COPIED = 2**20


class StopGradients(TorchFunctionMode):
    """Keeps the values that a loss detaches at its first evaluation, and returns them at every later one."""

    def __init__(self) -> None:
        super().__init__()
        self._values: list[Any] = []
        self._position = 0
        self._is_first = True
        self._is_suspended = False
        self._without_gradient = WithoutGradient(self._constant)
        # Results inside of `no_grad`, of which those are kept that are alive at its end.
        self._results: list[tuple[int, weakref.ref[Tensor], int]] = []
        self._written: set[int] = set()  # those that a later line inside of it writes in place

    def __enter__(self) -> StopGradients:
        self._position = 0
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._is_suspended:  # an interrupt leaves the model's forward without `resume`
            super().__exit__(*error)
        self._is_suspended = False
        self._without_gradient.leave()
        self._end_without_gradient()
        self._is_first = False

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            self._without_gradient.see(args[0], sys._getframe(1))
            if not self._without_gradient.is_active:
                self._end_without_gradient()
            return result
        is_value = func in _DETACH and isinstance(result, Tensor) and result.is_floating_point()
        is_number = isinstance(result, float) or (isinstance(result, list) and args[0].is_floating_point())
        is_value = is_value or (func in _NUMBER and is_number)
        if not is_value and not self._without_gradient.makes_constants:
            return result
        # The engine's own code detaches the tensors that make a probe.
        if is_engines(sys._getframe(1)):
            return result
        if is_value:
            return self._kept(result)
        given = (*args, *(kwargs or {}).values())  # a result that is an argument was written in place
        return tree_map(lambda one: one if any(one is arg for arg in given) else self._constant(one), result)

    @property
    def is_empty(self) -> bool:
        """True if the first evaluation has detached nothing."""
        return all(value is None for value in self._values)

    def _kept(self, result: Any) -> Any:
        """Return a detached value as it was at the first evaluation."""
        if self._is_first:
            self._values.append(_copy(result))
            return result
        position, self._position = self._position, self._position + 1
        kept = self._values[position] if position < len(self._values) else None
        if kept is None or not _is_alike(kept, result):
            return result
        if position in self._written:
            self._results.append((position, weakref.ref(result), result._version))
            return result
        return _copy(kept)

    def _constant(self, result: Any) -> Any:
        """Return a result inside of `no_grad` as it was at the first evaluation, if it was used after that."""
        if not isinstance(result, Tensor) or result.is_inference():
            return result
        if not self._is_first:
            return self._kept(result)
        self._results.append((len(self._values), weakref.ref(result), result._version))
        self._values.append(None)
        return result

    def _end_without_gradient(self) -> None:
        """Keep the results that are used after `no_grad`; later, give those that it has written the kept values."""
        for position, reference, version in self._results:
            result = reference()
            if result is None:
                continue
            if not self._is_first:
                with torch.no_grad():
                    result.copy_(self._values[position])
                continue
            self._values[position] = _copy(result)
            if result._version != version:
                self._written.add(position)
        self._results.clear()

    @staticmethod
    def suspend() -> StopGradients | None:
        """Take the mode off for a forward of the model, which then runs at full speed; return it for `resume`."""
        mode = _get_current_function_mode()
        if not isinstance(mode, StopGradients):
            return None
        _pop_mode()
        mode._is_suspended = True
        return mode

    @staticmethod
    def resume(mode: StopGradients | None) -> None:
        """Put back what `suspend` returned."""
        if mode is not None:
            _push_mode(mode)
            mode._is_suspended = False


def _copy(value: Any) -> Any:
    """Return a copy, because a loss may write into it; a large tensor is not copied."""
    if isinstance(value, list):
        return copy.deepcopy(value)
    is_small = isinstance(value, Tensor) and value.numel() <= MOST_COPIED
    return value.detach().clone() if is_small else value


def _is_alike(kept: Any, result: Any) -> bool:
    if isinstance(kept, Tensor) and isinstance(result, Tensor):
        return kept.shape == result.shape and kept.dtype == result.dtype
    if isinstance(kept, list) and isinstance(result, list):
        return len(kept) == len(result) and all(map(_is_alike, kept, result))
    return isinstance(kept, float) and isinstance(result, float)
