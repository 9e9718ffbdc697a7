"""Backward passes that a loss defines itself, and that probes never call.

A gradient reversal layer computes the identity, and its backward pass changes the sign. A straight-through estimator rounds,
and its backward pass is the identity. A difference of losses follows what the forward pass computes, so the run says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.autograd import Function

from zo_hf.evaluation.own_modules import is_own_class

logger = logging.getLogger(__name__)

#: Their backward passes are the derivatives of their forward passes.
_KERNELS = (
    "bitsandbytes",
    "causal_conv1d",
    "fla",
    "flash_attn",
    "kernels",
    "liger_kernel",
    "mamba_ssm",
    "torchao",
    "trl",
)


class OwnBackward:
    """Warns, after the first evaluation of a run's loss, of the autograd functions of the user's own that it has called."""

    def __init__(self) -> None:
        self._has_looked = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Enter an evaluation of the loss."""
        if self._has_looked:
            yield
            return
        self._has_looked = True
        found: dict[str, None] = {}
        stock: Any = vars(Function)["apply"]

        def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
            if is_own_class(cls, _KERNELS):
                found[cls.__qualname__.rpartition(".")[2]] = None
            return stock.__func__(cls, *args, **kwargs)

        Function.apply = classmethod(apply)  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            Function.apply = stock  # type: ignore[method-assign]
        if found:
            logger.warning(
                "the loss calls %s, which has a backward pass of its own that no probe calls: the run follows what the forward "
                "pass computes, and a reversed or straight-through gradient has no effect",
                " and ".join(found),
            )
